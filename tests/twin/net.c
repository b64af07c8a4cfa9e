/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * One port, "dpdk0": receive, Ethernet, ARP, echo, transmit; IPv6's neighbours in ndisc.c. Neighbours are one locked table for all workers, because
 * the answer to one's question may arrive at another. A packet whose next hop is unknown waits in its entry, a few at
 * most.
 */
#include <rte_arp.h>
#include <rte_icmp.h>

#include "twin.h"

#define DESCRIPTORS 256
#define MBUFS 16383
#define MBUF_CACHE 256
#define NEIGHBOURS 1024
#define WAITING 8
#define NEIGHBOUR_FRESH_S 60
#define ASK_AGAIN_S 1

struct neighbour {
    int af; /* 0: free */
    union inet_addr addr;
    bool known;
    struct rte_ether_addr mac;
    uint64_t confirmed; /* cycles */
    uint64_t asked;
    struct rte_mbuf *waiting[WAITING];
    int nwaiting;
};

struct tx_queue {
    uint16_t count;
    struct rte_mbuf *mbufs[PKT_BURST];
};

static struct netif_port the_port = {.name = "dpdk0", .mtu = 1500};
struct netif_port *twin_port = &the_port;
static bool started; /* there is a device */

static struct neighbour neighbours[NEIGHBOURS];
static rte_spinlock_t neighbour_lock = RTE_SPINLOCK_INITIALIZER;
static uint32_t gateway;

static int queue_of[DPVS_MAX_LCORE];
static RTE_DEFINE_PER_LCORE(struct tx_queue, tx);

struct netif_port *netif_port_get(portid_t id)
{
    return id == the_port.id ? &the_port : NULL;
}

struct netif_port *netif_port_get_by_name(const char *name)
{
    return name && !strcmp(name, the_port.name) ? &the_port : NULL;
}

/* Transmit. */

static void flush(void)
{
    struct tx_queue *q = &RTE_PER_LCORE(tx);
    uint16_t sent;

    if (q->count == 0)
        return;
    sent = rte_eth_tx_burst(the_port.id, (uint16_t)queue_of[rte_lcore_id()], q->mbufs, q->count);
    this_stats->tx += sent;
    this_stats->dropped += q->count - sent;
    twin_worked();
    while (sent < q->count)
        rte_pktmbuf_free(q->mbufs[sent++]);
    q->count = 0;
}

/* A frame, from its Ethernet header on. Takes it over. */
int net_xmit(struct rte_mbuf *mbuf)
{
    struct tx_queue *q = &RTE_PER_LCORE(tx);

    if (!started || queue_of[rte_lcore_id()] < 0) {
        this_stats->dropped++;
        rte_pktmbuf_free(mbuf);
        return EDPVS_NODEV;
    }
    q->mbufs[q->count++] = mbuf;
    if (q->count == PKT_BURST)
        flush();
    return EDPVS_OK;
}

/* A packet, from its IP header on, to a neighbour. Takes it over. */
int net_xmit_to(struct rte_mbuf *mbuf, const struct rte_ether_addr *mac, uint16_t type)
{
    struct rte_ether_hdr *eth = (struct rte_ether_hdr *)rte_pktmbuf_prepend(mbuf, sizeof(*eth));

    if (!eth) {
        rte_pktmbuf_free(mbuf);
        return EDPVS_NOROOM;
    }
    eth->dst_addr = *mac;
    eth->src_addr = the_port.addr;
    eth->ether_type = htons(type);
    return net_xmit(mbuf);
}

/* ARP. */

static void send_arp(uint16_t op, const struct rte_ether_addr *to, uint32_t sip, const struct rte_ether_addr *tha,
                     uint32_t tip)
{
    struct rte_mbuf *mbuf = rte_pktmbuf_alloc(the_port.mbuf_pool);
    struct rte_arp_hdr *arp = mbuf ? (struct rte_arp_hdr *)rte_pktmbuf_append(mbuf, sizeof(*arp)) : NULL;

    if (!arp) {
        rte_pktmbuf_free(mbuf);
        return;
    }
    arp->arp_hardware = htons(RTE_ARP_HRD_ETHER);
    arp->arp_protocol = htons(RTE_ETHER_TYPE_IPV4);
    arp->arp_hlen = RTE_ETHER_ADDR_LEN;
    arp->arp_plen = 4;
    arp->arp_opcode = htons(op);
    arp->arp_data.arp_sha = the_port.addr;
    arp->arp_data.arp_sip = sip;
    arp->arp_data.arp_tha = *tha;
    arp->arp_data.arp_tip = tip;
    net_xmit_to(mbuf, to, RTE_ETHER_TYPE_ARP);
}

static void ask(struct neighbour *n, uint64_t now)
{
    static const struct rte_ether_addr everyone = {{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}}, nobody;
    union inet_addr source;

    if (n->asked && now - n->asked < ASK_AGAIN_S * g_cycles_per_sec)
        return;
    if (!ifa_source(n->af, &n->addr, &source))
        return;
    n->asked = now;
    if (n->af == AF_INET)
        send_arp(RTE_ARP_OP_REQUEST, &everyone, source.in.s_addr, &nobody, n->addr.in.s_addr);
    else
        ndisc_ask(&source, &n->addr);
}

/* Open addressing; entries never leave. */
static struct neighbour *neighbour_of(int af, const union inet_addr *addr)
{
    const uint32_t *w = addr->in6.s6_addr32;
    uint32_t fold = af == AF_INET ? addr->in.s_addr : w[0] ^ w[1] ^ w[2] ^ w[3];
    uint32_t at = (ntohl(fold) * 2654435761u) >> 22;

    for (int i = 0; i < NEIGHBOURS; i++) {
        struct neighbour *n = &neighbours[(at + (uint32_t)i) % NEIGHBOURS];
        if (n->af == 0) {
            n->af = af;
            n->addr = *addr;
        }
        if (n->af == af && inet_addr_equal(af, &n->addr, addr))
            return n;
    }
    return NULL;
}

void net_heard(int af, const union inet_addr *addr, const struct rte_ether_addr *mac)
{
    struct rte_mbuf *waiting[WAITING];
    struct neighbour *n;
    int count = 0;

    rte_spinlock_lock(&neighbour_lock);
    n = neighbour_of(af, addr);
    if (n) {
        n->mac = *mac;
        n->known = true;
        n->confirmed = rte_get_timer_cycles();
        count = n->nwaiting;
        memcpy(waiting, n->waiting, sizeof(waiting));
        n->nwaiting = 0;
    }
    rte_spinlock_unlock(&neighbour_lock);
    for (int i = 0; i < count; i++)
        net_xmit_to(waiting[i], mac, ether_type(af));
}

static void arp_input(struct rte_mbuf *mbuf)
{
    const struct rte_arp_hdr *arp = mbuf_header(mbuf, 0, sizeof(*arp));

    if (arp && arp->arp_protocol == htons(RTE_ETHER_TYPE_IPV4) && arp->arp_hlen == RTE_ETHER_ADDR_LEN) {
        union inet_addr sender = {.in.s_addr = arp->arp_data.arp_sip}, target = {.in.s_addr = arp->arp_data.arp_tip};
        bool ours = ifa_is_local(AF_INET, &target);

        if (ours && arp->arp_data.arp_sip)
            net_heard(AF_INET, &sender, &arp->arp_data.arp_sha);
        if (ours && arp->arp_opcode == htons(RTE_ARP_OP_REQUEST))
            send_arp(RTE_ARP_OP_REPLY, &arp->arp_data.arp_sha, arp->arp_data.arp_tip, &arp->arp_data.arp_sha,
                     arp->arp_data.arp_sip);
    }
    rte_pktmbuf_free(mbuf);
}

/* Routes: the connected subnets, and for IPv4 a gateway. */

void net_set_gateway(uint32_t addr)
{
    gateway = addr;
}

bool net_nexthop(int af, const union inet_addr *daddr, union inet_addr *nexthop)
{
    union inet_addr source;

    memset(nexthop, 0, sizeof(*nexthop));
    if (ifa_source(af, daddr, &source))
        *nexthop = *daddr;
    else if (af == AF_INET)
        nexthop->in.s_addr = gateway;
    else
        return false;
    return af != AF_INET || nexthop->in.s_addr != 0;
}

/* A packet, from its IP header on, to wherever `daddr` is reached. Takes it over. */
int net_output(int af, struct rte_mbuf *mbuf, const union inet_addr *daddr)
{
    uint64_t now = rte_get_timer_cycles();
    struct rte_ether_addr mac;
    union inet_addr nexthop;
    struct neighbour *n;
    int err = EDPVS_OK;
    bool known = false;

    if (!started || !net_nexthop(af, daddr, &nexthop)) {
        this_stats->no_route++;
        rte_pktmbuf_free(mbuf);
        return EDPVS_NOROUTE;
    }
    rte_spinlock_lock(&neighbour_lock);
    n = neighbour_of(af, &nexthop);
    if (n) {
        known = n->known;
        mac = n->mac;
        if (!known || now - n->confirmed > NEIGHBOUR_FRESH_S * g_cycles_per_sec)
            ask(n, now);
    }
    if (!known) {
        if (n && n->nwaiting < WAITING) {
            n->waiting[n->nwaiting++] = mbuf;
        } else {
            err = EDPVS_RESOURCE;
            this_stats->dropped++;
            rte_pktmbuf_free(mbuf);
        }
    }
    rte_spinlock_unlock(&neighbour_lock);
    return known ? net_xmit_to(mbuf, &mac, ether_type(af)) : err;
}

static void echo(struct rte_mbuf *mbuf)
{
    struct rte_ipv4_hdr *iph = ip4_hdr(mbuf);
    int offset = ip4_hdrlen(mbuf);
    struct rte_icmp_hdr *icmp = mbuf_header(mbuf, offset, sizeof(*icmp));
    union inet_addr from = {.in.s_addr = iph->src_addr};

    if (iph->next_proto_id != IPPROTO_ICMP || !icmp || icmp->icmp_type != RTE_IP_ICMP_ECHO_REQUEST) {
        this_stats->dropped++;
        rte_pktmbuf_free(mbuf);
        return;
    }
    iph->src_addr = iph->dst_addr;
    iph->dst_addr = from.in.s_addr;
    iph->time_to_live = 64;
    ip4_send_csum(iph);
    icmp->icmp_type = RTE_IP_ICMP_ECHO_REPLY;
    icmp->icmp_cksum = 0;
    icmp->icmp_cksum = (uint16_t)~rte_raw_cksum(icmp, rte_pktmbuf_data_len(mbuf) - (size_t)offset);
    net_output(AF_INET, mbuf, &from);
}

static void ip4_input(struct rte_mbuf *mbuf)
{
    const struct rte_ipv4_hdr *iph = mbuf_header(mbuf, 0, sizeof(*iph));
    uint16_t total = iph ? ntohs(iph->total_length) : 0;

    if (!iph || iph->version_ihl >> 4 != 4 || ip4_hdrlen(mbuf) < (int)sizeof(*iph) || total < ip4_hdrlen(mbuf) ||
        total > rte_pktmbuf_data_len(mbuf)) {
        this_stats->dropped++;
        rte_pktmbuf_free(mbuf);
        return;
    }
    rte_pktmbuf_trim(mbuf, (uint16_t)(rte_pktmbuf_data_len(mbuf) - total)); /* Ethernet's padding */
    switch (dp_vs_in(AF_INET, mbuf)) {
    case INET_STOLEN:
        break;
    case INET_ACCEPT: {
        union inet_addr to = {.in.s_addr = ip4_hdr(mbuf)->dst_addr};

        if (ifa_is_local(AF_INET, &to)) {
            echo(mbuf);
            break;
        }
    }
        /* fallthrough */
    default:
        this_stats->dropped++;
        rte_pktmbuf_free(mbuf);
    }
}

/* Headers that extend IPv6's own are not understood: what has them is dropped. */
static void ip6_input(struct rte_mbuf *mbuf, bool host)
{
    const struct rte_ipv6_hdr *iph = mbuf_header(mbuf, 0, sizeof(*iph));
    size_t total = iph ? ntohs(iph->payload_len) + sizeof(*iph) : 0;

    if (!iph || ntohl(iph->vtc_flow) >> 28 != 6 || total > rte_pktmbuf_data_len(mbuf)) {
        this_stats->dropped++;
        rte_pktmbuf_free(mbuf);
        return;
    }
    rte_pktmbuf_trim(mbuf, (uint16_t)(rte_pktmbuf_data_len(mbuf) - total));
    if (iph->proto == IPPROTO_ICMPV6) {
        ndisc_input(mbuf);
    } else if (!host || dp_vs_in(AF_INET6, mbuf) != INET_STOLEN) {
        this_stats->dropped++;
        rte_pktmbuf_free(mbuf);
    }
}

/* Frames, from their Ethernet header on: from the port or, redirected, from another worker. Takes them over. */
void net_input(struct rte_mbuf **mbufs, uint16_t count)
{
    for (uint16_t i = 0; i < count; i++) {
        struct rte_mbuf *mbuf = mbufs[i];
        const struct rte_ether_hdr *eth = mbuf_header(mbuf, 0, sizeof(*eth));
        uint16_t type = eth && mbuf->nb_segs == 1 ? ntohs(eth->ether_type) : 0;
        bool host = eth && rte_is_same_ether_addr(&eth->dst_addr, &the_port.addr);

        mbuf->l2_len = sizeof(*eth);
        mbuf->port = the_port.id;
        if (type == RTE_ETHER_TYPE_ARP) {
            rte_pktmbuf_adj(mbuf, sizeof(*eth));
            arp_input(mbuf);
        } else if (type == RTE_ETHER_TYPE_IPV4 && host) {
            rte_pktmbuf_adj(mbuf, sizeof(*eth));
            ip4_input(mbuf);
        } else if (type == RTE_ETHER_TYPE_IPV6 && (host || rte_is_multicast_ether_addr(&eth->dst_addr))) {
            rte_pktmbuf_adj(mbuf, sizeof(*eth));
            ip6_input(mbuf, host);
        } else {
            rte_pktmbuf_free(mbuf);
        }
    }
    twin_worked();
}

static void worker_io(void *dummy __rte_unused)
{
    unsigned cid = rte_lcore_id();
    struct rte_mbuf *mbufs[PKT_BURST];

    dp_vs_redirect_ring_proc((lcoreid_t)cid);
    if (started && queue_of[cid] >= 0) {
        uint16_t n = rte_eth_rx_burst(the_port.id, (uint16_t)queue_of[cid], mbufs, PKT_BURST);
        if (n > 0) {
            this_stats->rx += n;
            net_input(mbufs, n);
        }
    }
    flush();
}

static struct dpvs_lcore_job io_job = {.name = "recv_fwd", .type = LCORE_JOB_LOOP, .func = worker_io};

/* Without a device (a test that needs sessions alone) the port is there by name and swallows what is sent. */
int net_init(void)
{
    struct rte_eth_conf conf;
    uint16_t queues = (uint16_t)twin_conf.rx_queues, rx = DESCRIPTORS, tx_desc = DESCRIPTORS;

    for (int cid = 0; cid < DPVS_MAX_LCORE; cid++)
        queue_of[cid] = -1;
    for (int i = 0; i < twin_conf.nworkers; i++)
        if (twin_conf.workers[i].slave)
            queue_of[twin_conf.workers[i].cid] = twin_conf.workers[i].queue;
    dpvs_lcore_job_register(&io_job, LCORE_ROLE_FWD_WORKER);
    the_port.nrxq = the_port.ntxq = queues;
    the_port.mbuf_pool =
        rte_pktmbuf_pool_create("mbuf_pool_0", MBUFS, MBUF_CACHE, 0, RTE_MBUF_DEFAULT_BUF_SIZE, (int)rte_socket_id());
    if (!the_port.mbuf_pool)
        return EDPVS_NOMEM;
    if (rte_eth_dev_count_avail() == 0) {
        LOG(WARNING, "no device: sessions without packets only\n");
        return EDPVS_OK;
    }

    memset(&conf, 0, sizeof(conf));
    if (rte_eth_dev_configure(the_port.id, queues, queues, &conf) < 0 ||
        rte_eth_dev_adjust_nb_rx_tx_desc(the_port.id, &rx, &tx_desc) < 0)
        return EDPVS_DPDKAPIFAIL;
    for (uint16_t q = 0; q < queues; q++)
        if (rte_eth_rx_queue_setup(the_port.id, q, rx, rte_socket_id(), NULL, the_port.mbuf_pool) < 0 ||
            rte_eth_tx_queue_setup(the_port.id, q, tx_desc, rte_socket_id(), NULL) < 0)
            return EDPVS_DPDKAPIFAIL;
    rte_eth_macaddr_get(the_port.id, &the_port.addr);
    rte_eth_dev_get_mtu(the_port.id, &the_port.mtu);
    return EDPVS_OK;
}

int net_start(void)
{
    if (rte_eth_dev_count_avail() == 0)
        return EDPVS_OK;
    if (rte_eth_dev_start(the_port.id) < 0)
        return EDPVS_DPDKAPIFAIL;
    rte_eth_promiscuous_enable(the_port.id);
    started = true;
    return EDPVS_OK;
}

void net_stop(void)
{
    if (started)
        rte_eth_dev_stop(the_port.id);
    started = false;
}
