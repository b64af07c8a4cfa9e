/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Redirects (DPVS src/ipvs/ip_vs_redirect.c): with "redirect on", one global table of outbound tuples says which worker
 * owns a session, and a packet that arrives on another worker goes to the owner over a ring. The init and free calls
 * are made for every session, with the table or without it: they are where probes see sessions come and go.
 */
#include <rte_ring.h>

#include "twin.h"

#define RING_SIZE 2048
#define TABLE_SIZE (1 << 20)
#define TABLE_MASK (TABLE_SIZE - 1)

bool dp_vs_redirect_disable = true;

static struct list_head *dp_vs_cr_tbl;
static rte_spinlock_t *locks;
static struct rte_mempool *pools[DPVS_MAX_SOCKET];
static struct rte_ring *rings[DPVS_MAX_LCORE][DPVS_MAX_LCORE]; /* [to][from] */

static struct rte_mempool *this_pool(void)
{
    unsigned socket = rte_socket_id();
    return pools[socket < DPVS_MAX_SOCKET && pools[socket] ? socket : 0];
}

struct dp_vs_redirect *dp_vs_redirect_alloc(enum dpvs_fwd_mode fwdmode)
{
    struct dp_vs_redirect *r;

    if (dp_vs_redirect_disable)
        return NULL;
    if (fwdmode != DPVS_FWD_MODE_FNAT && fwdmode != DPVS_FWD_MODE_SNAT && fwdmode != DPVS_FWD_MODE_NAT)
        return NULL;
    if (rte_mempool_get(this_pool(), (void **)&r) != 0) {
        LOG(WARNING, "%s: no memory for redirect\n", __func__);
        return NULL;
    }
    memset(r, 0, sizeof(*r));
    r->redirect_pool = this_pool();
    return r;
}

void dp_vs_redirect_free(struct dp_vs_conn *conn)
{
    if (!conn->redirect)
        return;
    rte_mempool_put(this_pool(), conn->redirect);
    conn->redirect = NULL;
}

static uint32_t redirect_hash(const struct dp_vs_redirect *r)
{
    return dp_vs_conn_hashkey(r->af, &r->saddr, r->sport, &r->daddr, r->dport, TABLE_MASK);
}

void dp_vs_redirect_hash(struct dp_vs_conn *conn)
{
    struct dp_vs_redirect *r = conn->redirect;
    uint32_t hash;

    if (!r || (conn->flags & DPVS_CONN_F_REDIRECT_HASHED))
        return;
    hash = redirect_hash(r);
    rte_spinlock_lock(&locks[hash]);
    list_add(&r->list, &dp_vs_cr_tbl[hash]);
    rte_spinlock_unlock(&locks[hash]);
    conn->flags |= DPVS_CONN_F_REDIRECT_HASHED;
}

void dp_vs_redirect_unhash(struct dp_vs_conn *conn)
{
    struct dp_vs_redirect *r = conn->redirect;
    uint32_t hash;

    if (!r || !(conn->flags & DPVS_CONN_F_REDIRECT_HASHED))
        return;
    hash = redirect_hash(r);
    rte_spinlock_lock(&locks[hash]);
    list_del(&r->list);
    rte_spinlock_unlock(&locks[hash]);
    conn->flags &= (uint16_t)~DPVS_CONN_F_REDIRECT_HASHED;
}

void dp_vs_redirect_init(struct dp_vs_conn *conn)
{
    enum dpvs_fwd_mode mode = conn->dest->fwdmode;
    struct dp_vs_redirect *r = conn->redirect;
    const struct conn_tuple_hash *t;

    if (!r)
        return;
    t = mode == DPVS_FWD_MODE_SNAT ? &tuplehash_in(conn) : &tuplehash_out(conn);
    r->af = (uint8_t)t->af;
    r->proto = t->proto;
    r->saddr = t->saddr;
    r->daddr = t->daddr;
    r->sport = t->sport;
    r->dport = t->dport;
    r->cid = (lcoreid_t)rte_lcore_id();
}

struct dp_vs_redirect *dp_vs_redirect_get(int af, uint16_t proto, const union inet_addr *saddr,
                                          const union inet_addr *daddr, uint16_t sport, uint16_t dport)
{
    struct dp_vs_redirect *r, *found = NULL;
    uint32_t hash;

    if (dp_vs_redirect_disable)
        return NULL;
    hash = dp_vs_conn_hashkey(af, saddr, sport, daddr, dport, TABLE_MASK);
    rte_spinlock_lock(&locks[hash]);
    list_for_each_entry (r, &dp_vs_cr_tbl[hash], list) {
        if (r->af == af && r->proto == proto && r->sport == sport && r->dport == dport &&
            inet_addr_equal(af, &r->saddr, saddr) && inet_addr_equal(af, &r->daddr, daddr)) {
            found = r;
            break;
        }
    }
    rte_spinlock_unlock(&locks[hash]);
    return found;
}

/* Hand a packet, from its Ethernet header on, to its owner. */
int dp_vs_redirect_pkt(struct rte_mbuf *mbuf, lcoreid_t peer_cid)
{
    struct rte_ring *ring = rings[peer_cid][rte_lcore_id()];

    if (!ring || rte_ring_enqueue(ring, mbuf) != 0)
        return INET_DROP;
    this_stats->redirected++;
    return INET_STOLEN;
}

void dp_vs_redirect_ring_proc(lcoreid_t cid)
{
    struct rte_mbuf *mbufs[PKT_BURST];

    if (dp_vs_redirect_disable)
        return;
    for (int from = 0; from < DPVS_MAX_LCORE; from++) {
        unsigned n = rings[cid][from] ? rte_ring_dequeue_burst(rings[cid][from], (void **)mbufs, PKT_BURST, NULL) : 0;
        if (n > 0)
            net_input(mbufs, (uint16_t)n);
    }
}

static int create_rings(void)
{
    for (int to = 0; to < DPVS_MAX_LCORE; to++)
        for (int from = 0; from < DPVS_MAX_LCORE; from++) {
            char name[RTE_RING_NAMESIZE];

            if (to == from || !netif_lcore_is_fwd_worker((lcoreid_t)to) || !netif_lcore_is_fwd_worker((lcoreid_t)from))
                continue;
            snprintf(name, sizeof(name), "dp_vs_redirect_ring[%d[%d]", to, from);
            rings[to][from] = rte_ring_create(name, RING_SIZE, (int)rte_socket_id(), RING_F_SP_ENQ | RING_F_SC_DEQ);
            if (!rings[to][from])
                return EDPVS_NOMEM;
        }
    return EDPVS_OK;
}

int dp_vs_redirects_init(void)
{
    dp_vs_redirect_disable = !twin_conf.redirect;
    if (dp_vs_redirect_disable)
        return EDPVS_OK;
    if (create_rings() != EDPVS_OK)
        return EDPVS_NOMEM;
    for (int i = 0; i < RTE_MIN(get_numa_nodes(), DPVS_MAX_SOCKET); i++) {
        char name[32];

        snprintf(name, sizeof(name), "dp_vs_redirect_%d", i);
        pools[i] = rte_mempool_create(name, (unsigned)dp_vs_conn_pool_size(), sizeof(struct dp_vs_redirect),
                                      (unsigned)dp_vs_conn_pool_cache_size(), 0, NULL, NULL, NULL, NULL, i, 0);
        if (!pools[i])
            return EDPVS_NOMEM;
    }
    dp_vs_cr_tbl = rte_malloc(NULL, sizeof(*dp_vs_cr_tbl) * TABLE_SIZE, RTE_CACHE_LINE_SIZE);
    locks = rte_zmalloc(NULL, sizeof(*locks) * TABLE_SIZE, RTE_CACHE_LINE_SIZE);
    if (!dp_vs_cr_tbl || !locks)
        return EDPVS_NOMEM;
    for (int i = 0; i < TABLE_SIZE; i++)
        INIT_LIST_HEAD(&dp_vs_cr_tbl[i]);
    return EDPVS_OK;
}
