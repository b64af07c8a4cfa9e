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

static int fast(int af, struct rte_mbuf *mbuf, const struct rte_ether_addr *smac, const struct rte_ether_addr *dmac)
{
    struct rte_ether_hdr *eth = (struct rte_ether_hdr *)rte_pktmbuf_prepend(mbuf, sizeof(*eth));

    if (!eth)
        return drop(mbuf, EDPVS_NOROOM);
    eth->dst_addr = *dmac;
    eth->src_addr = *smac;
    eth->ether_type = htons(ether_type(af));
    return net_xmit(mbuf);
}

/* Remember the way for whoever looks at the session; it is not what we send by. */
static void cache_route(struct dp_vs_conn *conn, bool in)
{
    static const union inet_addr any;
    int af = in ? tuplehash_out(conn).af : tuplehash_in(conn).af;
    struct netif_port **dev = in ? &conn->in_dev : &conn->out_dev;
    union inet_addr *hop = in ? &conn->in_nexthop : &conn->out_nexthop;
    union inet_addr nexthop;

    if (*dev && !inet_addr_equal(af, hop, &any))
        return;
    if (net_nexthop(af, in ? &conn->daddr : &conn->caddr, &nexthop)) {
        *dev = twin_port;
        *hop = nexthop;
    }
}

/* Send by what was learned of that side, if it was, else by route. */
static int send_on(struct dp_vs_conn *conn, struct rte_mbuf *mbuf, bool in, bool cached)
{
    if (in)
        return cached ? fast(tuplehash_out(conn).af, mbuf, &conn->in_smac, &conn->in_dmac)
                      : net_output(tuplehash_out(conn).af, mbuf, &conn->daddr);
    return cached ? fast(tuplehash_in(conn).af, mbuf, &conn->out_smac, &conn->out_dmac)
                  : net_output(tuplehash_in(conn).af, mbuf, &conn->caddr);
}

static bool is_cached(const struct dp_vs_conn *conn, bool in)
{
    if (conn->flags & DPVS_CONN_F_NOFASTXMIT)
        return false;
    if (in)
        return conn->in_dev && !rte_is_zero_ether_addr(&conn->in_dmac) && !rte_is_zero_ether_addr(&conn->in_smac);
    return conn->out_dev && !rte_is_zero_ether_addr(&conn->out_dmac) && !rte_is_zero_ether_addr(&conn->out_smac);
}

/* Learn the way back from a packet, and say whether the way on is known. */
static bool learn_and_look(struct dp_vs_conn *conn, struct rte_mbuf *mbuf, bool in)
{
    bool cached;

    if (!(conn->flags & DPVS_CONN_F_NOFASTXMIT)) {
        if (in)
            learn(mbuf, &conn->out_smac, &conn->out_dmac, &conn->out_dev);
        else
            learn(mbuf, &conn->in_smac, &conn->in_dmac, &conn->in_dev);
    }
    cached = is_cached(conn, in);
    if (!cached)
        cache_route(conn, in);
    return cached;
}

static void put_ip6(struct rte_ipv6_hdr *iph, uint8_t proto, uint8_t hops, size_t payload, const union inet_addr *from,
                    const union inet_addr *to)
{
    memset(iph, 0, sizeof(*iph));
    iph->vtc_flow = htonl(6u << 28);
    iph->payload_len = htons((uint16_t)payload);
    iph->proto = proto;
    iph->hop_limits = hops;
    memcpy(&iph->src_addr, from, 16);
    memcpy(&iph->dst_addr, to, 16);
}

static void put_ip4(struct rte_ipv4_hdr *iph, uint8_t proto, uint8_t ttl, size_t total, const union inet_addr *from,
                    const union inet_addr *to)
{
    memset(iph, 0, sizeof(*iph));
    iph->version_ihl = 0x45;
    iph->total_length = htons((uint16_t)total);
    iph->fragment_offset = htons(RTE_IPV4_HDR_DF_FLAG);
    iph->time_to_live = ttl;
    iph->next_proto_id = proto;
    iph->src_addr = from->in.s_addr;
    iph->dst_addr = to->in.s_addr;
    ip4_send_csum(iph);
}

/* FullNAT. The addresses are replaced; between families, the whole header. */

static bool translate(struct rte_mbuf *mbuf, int from_af, int to_af, const union inet_addr *from,
                      const union inet_addr *to)
{
    uint8_t proto, hops;
    int old = ip_hdrlen(from_af, mbuf);

    if (from_af == AF_INET && to_af == AF_INET) {
        ip4_hdr(mbuf)->src_addr = from->in.s_addr;
        ip4_hdr(mbuf)->dst_addr = to->in.s_addr;
        return true;
    }
    if (from_af == AF_INET6 && to_af == AF_INET6) {
        memcpy(&ip6_hdr(mbuf)->src_addr, from, 16);
        memcpy(&ip6_hdr(mbuf)->dst_addr, to, 16);
        return true;
    }
    proto = from_af == AF_INET ? ip4_hdr(mbuf)->next_proto_id : ip6_hdr(mbuf)->proto;
    hops = from_af == AF_INET ? ip4_hdr(mbuf)->time_to_live : ip6_hdr(mbuf)->hop_limits;
    rte_pktmbuf_adj(mbuf, (uint16_t)old);
    if (to_af == AF_INET) {
        if (!rte_pktmbuf_prepend(mbuf, sizeof(struct rte_ipv4_hdr)))
            return false;
        put_ip4(ip4_hdr(mbuf), proto, hops, mbuf->pkt_len, from, to);
    } else {
        if (!rte_pktmbuf_prepend(mbuf, sizeof(struct rte_ipv6_hdr)))
            return false;
        put_ip6(ip6_hdr(mbuf), proto, hops, mbuf->pkt_len - sizeof(struct rte_ipv6_hdr), from, to);
    }
    return true;
}

/* What DPVS has: 4 to 4, 6 to 6, 6 to 4, and only with one family the way that was learned. */
static int xmit_fnat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf, bool in)
{
    int outside = tuplehash_in(conn).af, inside = tuplehash_out(conn).af;
    int (*handler)(struct dp_vs_proto *, struct dp_vs_conn *, struct rte_mbuf *) =
        in ? proto->fnat_in_handler : proto->fnat_out_handler;
    bool cached = false;

    if (outside == AF_INET && inside == AF_INET6)
        return drop(mbuf, EDPVS_NOTSUPP);
    if (outside == inside)
        cached = learn_and_look(conn, mbuf, in);
    else
        cache_route(conn, in);
    if (!translate(mbuf, in ? outside : inside, in ? inside : outside, in ? &conn->laddr : &conn->vaddr,
                   in ? &conn->daddr : &conn->caddr))
        return drop(mbuf, EDPVS_NOROOM);
    if (handler && handler(proto, conn, mbuf) != EDPVS_OK)
        return drop(mbuf, EDPVS_INVPKT);
    if ((in ? inside : outside) == AF_INET)
        ip4_send_csum(ip4_hdr(mbuf));
    return send_on(conn, mbuf, in, cached);
}

int dp_vs_xmit_fnat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    return xmit_fnat(proto, conn, mbuf, true);
}

int dp_vs_out_xmit_fnat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    return xmit_fnat(proto, conn, mbuf, false);
}

int dp_vs_xmit_dr(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    if (tuplehash_out(conn).af != conn->af)
        return drop(mbuf, EDPVS_NOTSUPP);
    cache_route(conn, true);
    return net_output(conn->af, mbuf, &conn->daddr);
}

/* NAT. One address and port is replaced; DPVS sends the learned way with IPv4 alone. */

static int xmit_nat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf, bool in)
{
    int (*handler)(struct dp_vs_proto *, struct dp_vs_conn *, struct rte_mbuf *) =
        in ? proto->nat_in_handler : proto->nat_out_handler;
    bool cached = false;

    if (tuplehash_out(conn).af != conn->af)
        return drop(mbuf, EDPVS_NOTSUPP);
    if (conn->af == AF_INET)
        cached = learn_and_look(conn, mbuf, in);
    else
        cache_route(conn, in);
    if (!translate(mbuf, conn->af, conn->af, in ? &conn->caddr : &conn->vaddr, in ? &conn->daddr : &conn->caddr))
        return drop(mbuf, EDPVS_NOROOM);
    if (handler && handler(proto, conn, mbuf) != EDPVS_OK)
        return drop(mbuf, EDPVS_INVPKT);
    if (conn->af == AF_INET)
        ip4_send_csum(ip4_hdr(mbuf));
    return send_on(conn, mbuf, in, cached);
}

int dp_vs_xmit_nat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    return xmit_nat(proto, conn, mbuf, true);
}

int dp_vs_out_xmit_nat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    return xmit_nat(proto, conn, mbuf, false);
}

/* Tunnel: the packet as it is within one to the real server. IP in IP, IPv6 in IPv6, IPv6 in IP. */
int dp_vs_xmit_tunnel(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    int outer = conn->af == AF_INET ? AF_INET : tuplehash_out(conn).af;
    uint8_t proto_inside = conn->af == AF_INET ? IPPROTO_IPIP : IPPROTO_IPV6;
    size_t inner_bytes = mbuf->pkt_len;
    union inet_addr source;

    if (!ifa_source(outer, &conn->daddr, &source))
        return drop(mbuf, EDPVS_NOROUTE);
    cache_route(conn, true);
    if (!rte_pktmbuf_prepend(mbuf, outer == AF_INET ? sizeof(struct rte_ipv4_hdr) : sizeof(struct rte_ipv6_hdr)))
        return drop(mbuf, EDPVS_NOROOM);
    if (mbuf->pkt_len > twin_port->mtu)
        return drop(mbuf, EDPVS_FRAG);
    if (outer == AF_INET)
        put_ip4(ip4_hdr(mbuf), proto_inside, 64, mbuf->pkt_len, &source, &conn->daddr);
    else
        put_ip6(ip6_hdr(mbuf), proto_inside, 64, inner_bytes, &source, &conn->daddr);
    return net_output(outer, mbuf, &conn->daddr);
}

/* Sessions of this mode can be made and looked at; the twin does not carry their packets. */

int dp_vs_xmit_snat(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn __rte_unused, struct rte_mbuf *mbuf)
{
    return drop(mbuf, EDPVS_NOTSUPP);
}

int dp_vs_out_xmit_snat(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn __rte_unused,
                        struct rte_mbuf *mbuf)
{
    return drop(mbuf, EDPVS_NOTSUPP);
}
