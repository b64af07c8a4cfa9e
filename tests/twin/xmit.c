/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Transmitters (DPVS src/ipvs/ip_vs_xmit.c). A FullNAT session learns the Ethernet addresses of both its sides from the
 * first packet of each and uses them from then on ("fast xmit"), without a route; until then, and for the rest, by
 * route and ARP. Every transmitter takes the packet over, whatever it answers.
 */
#include "twin.h"

static int drop(struct rte_mbuf *mbuf, int err)
{
    this_stats->dropped++;
    rte_pktmbuf_free(mbuf);
    return err;
}

/* The sender of this packet is where answers go. Packets of our own making (l2_len 0) teach nothing. */
static void learn(struct rte_mbuf *mbuf, struct rte_ether_addr *smac, struct rte_ether_addr *dmac,
                  struct netif_port **dev)
{
    const struct rte_ether_hdr *eth;

    if ((!rte_is_zero_ether_addr(smac) && !rte_is_zero_ether_addr(dmac)) || mbuf->l2_len != sizeof(*eth))
        return;
    eth = (const struct rte_ether_hdr *)(rte_pktmbuf_mtod(mbuf, char *) - sizeof(*eth));
    *dmac = eth->src_addr;
    *smac = eth->dst_addr;
    *dev = netif_port_get(mbuf->port);
}

static int fast(struct rte_mbuf *mbuf, const struct rte_ether_addr *smac, const struct rte_ether_addr *dmac)
{
    struct rte_ether_hdr *eth = (struct rte_ether_hdr *)rte_pktmbuf_prepend(mbuf, sizeof(*eth));

    if (!eth)
        return drop(mbuf, EDPVS_NOROOM);
    eth->dst_addr = *dmac;
    eth->src_addr = *smac;
    eth->ether_type = htons(RTE_ETHER_TYPE_IPV4);
    return net_xmit(mbuf);
}

/* Remember the way for whoever looks at the session; it is not what we send by. */
static void cache_route(struct dp_vs_conn *conn, bool in)
{
    struct netif_port **dev = in ? &conn->in_dev : &conn->out_dev;
    union inet_addr *hop = in ? &conn->in_nexthop : &conn->out_nexthop;
    uint32_t nexthop;

    if (*dev && hop->in.s_addr)
        return;
    if (net_nexthop4(in ? conn->daddr.in.s_addr : conn->caddr.in.s_addr, &nexthop)) {
        *dev = twin_port;
        hop->in.s_addr = nexthop;
    }
}

int dp_vs_xmit_fnat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    bool cached;

    if (tuplehash_in(conn).af != AF_INET || tuplehash_out(conn).af != AF_INET)
        return drop(mbuf, EDPVS_NOTSUPP);
    if (!(conn->flags & DPVS_CONN_F_NOFASTXMIT))
        learn(mbuf, &conn->out_smac, &conn->out_dmac, &conn->out_dev);
    cached = conn->in_dev && !(conn->flags & DPVS_CONN_F_NOFASTXMIT) && !rte_is_zero_ether_addr(&conn->in_dmac) &&
             !rte_is_zero_ether_addr(&conn->in_smac);
    if (!cached)
        cache_route(conn, true);

    ip4_hdr(mbuf)->src_addr = conn->laddr.in.s_addr;
    ip4_hdr(mbuf)->dst_addr = conn->daddr.in.s_addr;
    if (proto->fnat_in_handler && proto->fnat_in_handler(proto, conn, mbuf) != EDPVS_OK)
        return drop(mbuf, EDPVS_INVPKT);
    ip4_send_csum(ip4_hdr(mbuf));
    return cached ? fast(mbuf, &conn->in_smac, &conn->in_dmac) : net_output4(mbuf, conn->daddr.in.s_addr);
}

int dp_vs_out_xmit_fnat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    bool cached;

    if (tuplehash_in(conn).af != AF_INET || tuplehash_out(conn).af != AF_INET)
        return drop(mbuf, EDPVS_NOTSUPP);
    if (!(conn->flags & DPVS_CONN_F_NOFASTXMIT))
        learn(mbuf, &conn->in_smac, &conn->in_dmac, &conn->in_dev);
    cached = conn->out_dev && !(conn->flags & DPVS_CONN_F_NOFASTXMIT) && !rte_is_zero_ether_addr(&conn->out_dmac) &&
             !rte_is_zero_ether_addr(&conn->out_smac);
    if (!cached)
        cache_route(conn, false);

    ip4_hdr(mbuf)->src_addr = conn->vaddr.in.s_addr;
    ip4_hdr(mbuf)->dst_addr = conn->caddr.in.s_addr;
    if (proto->fnat_out_handler && proto->fnat_out_handler(proto, conn, mbuf) != EDPVS_OK)
        return drop(mbuf, EDPVS_INVPKT);
    ip4_send_csum(ip4_hdr(mbuf));
    return cached ? fast(mbuf, &conn->out_smac, &conn->out_dmac) : net_output4(mbuf, conn->caddr.in.s_addr);
}

int dp_vs_xmit_dr(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    if (conn->af != AF_INET)
        return drop(mbuf, EDPVS_NOTSUPP);
    cache_route(conn, true);
    return net_output4(mbuf, conn->daddr.in.s_addr);
}

/* Sessions of these modes can be made and looked at; the twin does not carry their packets. */

int dp_vs_xmit_nat(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn __rte_unused, struct rte_mbuf *mbuf)
{
    return drop(mbuf, EDPVS_NOTSUPP);
}

int dp_vs_out_xmit_nat(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn __rte_unused,
                       struct rte_mbuf *mbuf)
{
    return drop(mbuf, EDPVS_NOTSUPP);
}

int dp_vs_xmit_tunnel(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn __rte_unused,
                      struct rte_mbuf *mbuf)
{
    return drop(mbuf, EDPVS_NOTSUPP);
}

int dp_vs_xmit_snat(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn __rte_unused, struct rte_mbuf *mbuf)
{
    return drop(mbuf, EDPVS_NOTSUPP);
}

int dp_vs_out_xmit_snat(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn __rte_unused,
                        struct rte_mbuf *mbuf)
{
    return drop(mbuf, EDPVS_NOTSUPP);
}
