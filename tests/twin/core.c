/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The way of a packet to its session (DPVS src/ipvs/ip_vs_{core,proto}.c): look up, else see whether another worker
 * owns it, else schedule a new session; then the state machine, then transmit.
 */
#include "twin.h"

static struct dp_vs_proto *protocols[256];

struct dp_vs_proto *dp_vs_proto_lookup(uint8_t proto)
{
    return protocols[proto];
}

int dp_vs_proto_init(void)
{
    struct dp_vs_proto *all[] = {&dp_vs_proto_udp, &dp_vs_proto_tcp, &dp_vs_proto_sctp};

    for (size_t i = 0; i < RTE_DIM(all); i++) {
        protocols[all[i]->proto] = all[i];
        if (all[i]->init)
            all[i]->init(all[i]);
    }
    return EDPVS_OK;
}

/* Common to all: by the ports; on a miss `peer_cid` becomes the owner, if there is another one. */
struct dp_vs_conn *proto_lookup(const struct dp_vs_iphdr *iph, struct rte_mbuf *mbuf, int *direct, bool reverse,
                                lcoreid_t *peer_cid)
{
    const uint16_t *ports = mbuf_header(mbuf, iph->len, 4);
    struct dp_vs_redirect *r;
    struct dp_vs_conn *conn;

    if (!ports)
        return NULL;
    conn = dp_vs_conn_get(iph->af, iph->proto, &iph->saddr, &iph->daddr, ports[0], ports[1], direct, reverse);
    if (conn)
        return conn;
    r = dp_vs_redirect_get(iph->af, iph->proto, &iph->saddr, &iph->daddr, ports[0], ports[1]);
    if (r)
        *peer_cid = r->cid;
    return NULL;
}

/* The template of a client, which ties it to its server for as long as it comes back in time; made if there is none. */
static struct dp_vs_conn *template_of(struct dp_vs_service *svc, const struct dp_vs_iphdr *iph, struct rte_mbuf *mbuf)
{
    union inet_addr client = iph->saddr, vaddr = iph->daddr;
    struct dp_vs_conn_param param = {.af = iph->af, .proto = iph->proto, .caddr = &client, .vaddr = &vaddr};
    struct dp_vs_conn *ct;
    struct dp_vs_dest *dest;

    if (iph->af == AF_INET)
        client.in.s_addr &= svc->netmask;
    else
        for (uint32_t bit = svc->netmask; bit < 128; bit++)
            client.in6.s6_addr[bit / 8] &= (uint8_t)~(0x80 >> bit % 8);
    ct = dp_vs_ct_in_get(iph->af, iph->proto, &client, &vaddr, 0, svc->port);
    if (ct && ct->dest->flags & DPVS_DEST_F_AVAILABLE)
        return ct;
    if (ct)
        dp_vs_conn_put_no_reset(ct); /* DPVS takes it out of use; here it stands until its time is over */
    dest = svc->scheduler->schedule(svc, mbuf, iph);
    if (!dest) {
        LOG(INFO, "%s: no dest found.\n", __func__);
        return NULL;
    }
    param.vport = svc->port;
    ct = dp_vs_conn_new(mbuf, iph, &param, dest, DPVS_CONN_F_TEMPLATE);
    if (ct)
        ct->timeout.tv_sec = svc->timeout;
    return ct;
}

/* Choose a server and make the session. */
struct dp_vs_conn *dp_vs_schedule(struct dp_vs_service *svc, const struct dp_vs_iphdr *iph, struct rte_mbuf *mbuf,
                                  bool is_synproxy_on __rte_unused)
{
    const uint16_t *ports = mbuf_header(mbuf, iph->len, 4);
    struct dp_vs_conn_param param = {.af = iph->af, .proto = iph->proto, .caddr = &iph->saddr, .vaddr = &iph->daddr};
    struct dp_vs_conn *conn, *ct = NULL;
    struct dp_vs_dest *dest;

    if (!ports)
        return NULL;
    if (svc->flags & DP_VS_SVC_F_PERSISTENT) {
        ct = template_of(svc, iph, mbuf);
        if (!ct)
            return NULL;
        param.ct_dport = ct->dest->port;
    }
    dest = ct ? ct->dest : svc->scheduler->schedule(svc, mbuf, iph);
    if (!dest) {
        LOG(INFO, "%s: no dest found.\n", __func__);
        return NULL;
    }
    param.cport = ports[0];
    param.vport = ports[1];
    conn = dp_vs_conn_new(mbuf, iph, &param, dest, 0);
    if (conn && ct) {
        conn->control = ct;
        rte_atomic32_inc(&ct->n_control);
    }
    if (ct)
        dp_vs_conn_put(ct);
    if (conn) {
        dest->stats.conns++;
        svc->stats.conns++;
    }
    return conn;
}

static int transmit(struct rte_mbuf *mbuf, struct dp_vs_proto *prot, struct dp_vs_conn *conn, int dir)
{
    int (*xmit)(struct dp_vs_proto *, struct dp_vs_conn *, struct rte_mbuf *) =
        dir == DPVS_CONN_DIR_INBOUND ? conn->packet_xmit : conn->packet_out_xmit;
    struct dp_vs_stats *stats;

    if (!conn->dest) {
        dp_vs_conn_put_no_reset(conn);
        return INET_DROP;
    }
    stats = &conn->dest->stats;
    if (dir == DPVS_CONN_DIR_INBOUND)
        stats->inpkts++, stats->inbytes += mbuf->pkt_len;
    else
        stats->outpkts++, stats->outbytes += mbuf->pkt_len;
    if (!xmit) {
        LOG(WARNING, "%s: missing xmit\n", __func__);
        dp_vs_conn_put(conn);
        return INET_ACCEPT;
    }
    xmit(prot, conn, mbuf);
    dp_vs_conn_put(conn);
    return INET_STOLEN;
}

/* A packet for us, from its IP header on. Of IPv6, one without extension headers. */
int dp_vs_in(int af, struct rte_mbuf *mbuf)
{
    lcoreid_t cid = (lcoreid_t)rte_lcore_id(), peer_cid = cid;
    int dir = DPVS_CONN_DIR_INBOUND, verdict = INET_DROP;
    struct dp_vs_iphdr iph;
    struct dp_vs_proto *prot;
    struct dp_vs_conn *conn;
    bool drop = false;

    memset(&iph, 0xa5, sizeof(iph)); /* DPVS leaves rubbish above an IPv4 address: so that nobody relies on zeros */
    iph.af = af;
    iph.len = ip_hdrlen(af, mbuf);
    if (af == AF_INET) {
        iph.proto = ip4_hdr(mbuf)->next_proto_id;
        iph.saddr.in.s_addr = ip4_hdr(mbuf)->src_addr;
        iph.daddr.in.s_addr = ip4_hdr(mbuf)->dst_addr;
    } else {
        iph.proto = ip6_hdr(mbuf)->proto;
        memcpy(&iph.saddr, &ip6_hdr(mbuf)->src_addr, 16);
        memcpy(&iph.daddr, &ip6_hdr(mbuf)->dst_addr, 16);
    }
    prot = dp_vs_proto_lookup(iph.proto);
    if (!prot)
        return INET_ACCEPT;
    if (af == AF_INET && ip4_hdr(mbuf)->fragment_offset & htons(RTE_IPV4_HDR_MF_FLAG | RTE_IPV4_HDR_OFFSET_MASK))
        return INET_DROP;

    conn = prot->conn_lookup(prot, &iph, mbuf, &dir, false, &drop, &peer_cid);
    if (peer_cid != cid) {
        rte_pktmbuf_prepend(mbuf, sizeof(struct rte_ether_hdr));
        return dp_vs_redirect_pkt(mbuf, peer_cid);
    }
    if (!conn) {
        if (prot->conn_sched(prot, &iph, mbuf, &conn, &verdict) != EDPVS_OK)
            return verdict;
        dir = DPVS_CONN_DIR_INBOUND;
    }
    if (conn->proto == IPPROTO_TCP && conn->flags & DPVS_CONN_F_SYNPROXY && conn->state == DPVS_TCP_S_SYN_SENT)
        return synproxy_wait(conn, mbuf, dir);
    prot->state_trans(prot, conn, mbuf, dir);
    conn->old_state = conn->state;
    return transmit(mbuf, prot, conn, dir);
}
