/* SPDX-License-Identifier: GPL-2.0-or-later */
/* UDP (DPVS src/ipvs/ip_vs_proto_udp.c), without the client address option (uoa_max_trail 0). */
#include <rte_udp.h>

#include "twin.h"

static int udp_conn_sched(struct dp_vs_proto *proto __rte_unused, const struct dp_vs_iphdr *iph, struct rte_mbuf *mbuf,
                          struct dp_vs_conn **conn, int *verdict)
{
    const struct rte_udp_hdr *uh = mbuf_header(mbuf, iph->len, sizeof(*uh));
    struct dp_vs_service *svc;

    *verdict = INET_DROP;
    if (!uh)
        return EDPVS_INVPKT;
    svc =
        dp_vs_service_lookup(iph->af, iph->proto, &iph->daddr, uh->dst_port, 0, mbuf, NULL, (lcoreid_t)rte_lcore_id());
    if (!svc) {
        *verdict = INET_ACCEPT;
        return EDPVS_NOSERV;
    }
    *conn = dp_vs_schedule(svc, iph, mbuf, false);
    return *conn ? EDPVS_OK : EDPVS_RESOURCE;
}

static struct dp_vs_conn *udp_conn_lookup(struct dp_vs_proto *proto __rte_unused, const struct dp_vs_iphdr *iph,
                                          struct rte_mbuf *mbuf, int *direct, bool reverse, bool *drop __rte_unused,
                                          lcoreid_t *peer_cid)
{
    return proto_lookup(iph, mbuf, direct, reverse, peer_cid);
}

/* Ports that are 0 stay. */
static int rewrite(int af, struct rte_mbuf *mbuf, uint16_t sport, uint16_t dport)
{
    struct rte_udp_hdr *uh = mbuf_header(mbuf, ip_hdrlen(af, mbuf), sizeof(*uh));

    if (!uh)
        return EDPVS_INVPKT;
    uh->src_port = sport ? sport : uh->src_port;
    uh->dst_port = dport ? dport : uh->dst_port;
    uh->dgram_cksum = 0;
    uh->dgram_cksum = l4_csum(af, mbuf, uh);
    return EDPVS_OK;
}

static int udp_fnat_in(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    return rewrite(tuplehash_out(conn).af, mbuf, conn->lport, conn->dport);
}

static int udp_fnat_out(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    return rewrite(tuplehash_in(conn).af, mbuf, conn->vport, conn->cport);
}

static int udp_nat_in(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    return rewrite(conn->af, mbuf, 0, conn->dport);
}

static int udp_nat_out(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    return rewrite(conn->af, mbuf, conn->vport, 0);
}

/* The INACTIVE flag stays on: a UDP session counts in inactconns all its life. */
static int udp_state_trans(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf __rte_unused,
                           int dir __rte_unused)
{
#ifdef TWIN_BEFORE_1_9_6
    conn->state = DPVS_UDP_S_NORMAL;
#else
    if (dir == DPVS_CONN_DIR_OUTBOUND)
        conn->state = DPVS_UDP_S_NORMAL;
    else if (conn->state == DPVS_UDP_S_NONE)
        conn->state = DPVS_UDP_S_ONEWAY;
#endif
    dp_vs_conn_set_timeout(conn, proto);
    return EDPVS_OK;
}

static int udp_expire_quiescent(struct dp_vs_conn *conn)
{
    dp_vs_conn_expire_now(conn);
    return EDPVS_OK;
}

struct dp_vs_proto dp_vs_proto_udp = {
    .name = "UDP",
    .proto = IPPROTO_UDP,
    .timeout_table = twin_udp_timeouts,
    .conn_sched = udp_conn_sched,
    .conn_lookup = udp_conn_lookup,
    .conn_expire_quiescent = udp_expire_quiescent,
    .nat_in_handler = udp_nat_in,
    .nat_out_handler = udp_nat_out,
    .fnat_in_handler = udp_fnat_in,
    .fnat_out_handler = udp_fnat_out,
    .state_trans = udp_state_trans,
};
