/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Sessions out of nothing, for load without packets: each worker makes its share of FullNAT TCP sessions of the first
 * such service through dp_vs_conn_new(), at a steady rate, ESTABLISHED, with sequence fields filled in. They end by
 * their timer, without the resets that a real one sends. Clients are 198.18.0.0/15 (RFC 2544), one after the other.
 */
#include <arpa/inet.h>

#include <rte_random.h>

#include "twin.h"

#define BATCH 64

struct order {
    uint64_t left;
    uint64_t rate; /* a second on this worker, 0: as fast as it can */
    uint64_t made;
    uint64_t since; /* cycles */
    uint32_t lifetime_ms;
    uint32_t next_client;
};

static RTE_DEFINE_PER_LCORE(struct order, order);
static struct rte_mbuf *nothing[DPVS_MAX_LCORE]; /* dp_vs_conn_new() insists on a packet */

static struct dp_vs_conn *make(struct dp_vs_service *svc, struct order *o)
{
    uint32_t n = o->next_client++;
    struct dp_vs_iphdr iph;
    struct dp_vs_conn_param param = {.af = AF_INET, .proto = IPPROTO_TCP, .caddr = &iph.saddr, .vaddr = &iph.daddr};
    struct dp_vs_dest *dest;
    struct dp_vs_conn *conn;

    memset(&iph, 0xa5, sizeof(iph));
    iph.af = AF_INET;
    iph.len = sizeof(struct rte_ipv4_hdr);
    iph.proto = IPPROTO_TCP;
    iph.saddr.in.s_addr = htonl((198u << 24 | 18u << 16) + (n >> 14) % (1 << 17));
    iph.daddr = svc->addr;
    param.cport = htons((uint16_t)(1024 + (n & 0x3fff) * 2 + rte_lcore_id() % 2));
    param.vport = svc->port;
    dest = svc->scheduler->schedule(svc, nothing[rte_lcore_id()], &iph);
    conn = dest ? dp_vs_conn_new(nothing[rte_lcore_id()], &iph, &param, dest, 0) : NULL;
    if (!conn)
        return NULL;
    dest->stats.conns++;
    tcp_mark_established(conn);
    conn->fnat_seq.isn = (uint32_t)rte_rand() | 1;
    conn->fnat_seq.delta = (uint32_t)rte_rand();
    conn->fnat_seq.fdata_seq = (uint32_t)rte_rand();
    conn->rs_end_seq = (uint32_t)rte_rand();
    conn->rs_end_ack = (uint32_t)rte_rand();
    conn->prot_data = &twin_quiet;
    conn->timeout.tv_sec = o->lifetime_ms / 1000;
    conn->timeout.tv_usec = o->lifetime_ms % 1000 * 1000;
    dp_vs_conn_put(conn);
    return conn;
}

static void worker_job(void *dummy __rte_unused)
{
    struct order *o = &RTE_PER_LCORE(order);
    struct dp_vs_service *svc;
    uint64_t due = BATCH;

    if (o->left == 0)
        return;
    if (o->rate) {
        double seconds = (double)(rte_get_timer_cycles() - o->since) / (double)g_cycles_per_sec;
        uint64_t target = (uint64_t)(seconds * (double)o->rate);
        due = target > o->made ? RTE_MIN(target - o->made, (uint64_t)BATCH) : 0;
    }
    svc = service_first(IPPROTO_TCP, DPVS_FWD_MODE_FNAT);
    if (!svc)
        o->left = due = 0;
    for (due = RTE_MIN(due, o->left); due > 0; due--, o->left--, o->made++) {
        twin_worked();
        if (make(svc, o))
            this_stats->synthetic++;
        else
            this_stats->synthetic_failed++;
    }
}

/* On each worker: its share of the order. */
int synthesize_start(uint64_t count, uint64_t rate, uint32_t lifetime_ms, uint32_t seed)
{
    struct order *o = &RTE_PER_LCORE(order);
    unsigned index = (unsigned)g_lcore_id2index[rte_lcore_id()] - 1, workers = g_slave_lcore_num;

    o->left += count / workers + (index < count % workers);
    o->rate = rate ? RTE_MAX(rate / workers, (uint64_t)1) : 0;
    o->lifetime_ms = lifetime_ms;
    o->made = 0;
    o->since = rte_get_timer_cycles();
    if (seed)
        o->next_client = seed;
    return service_first(IPPROTO_TCP, DPVS_FWD_MODE_FNAT) ? EDPVS_OK : EDPVS_NOSERV;
}

uint64_t synthesize_pending(void)
{
    return RTE_PER_LCORE(order).left;
}

static struct dpvs_lcore_job job = {.name = "synthesize", .type = LCORE_JOB_LOOP, .func = worker_job};

int synthesize_init(void)
{
    for (unsigned cid = 0; cid < DPVS_MAX_LCORE; cid++)
        if (netif_lcore_is_fwd_worker((lcoreid_t)cid)) {
            nothing[cid] = rte_pktmbuf_alloc(twin_port->mbuf_pool);
            if (!nothing[cid])
                return EDPVS_NOMEM;
        }
    return dpvs_lcore_job_register(&job, LCORE_ROLE_FWD_WORKER);
}
