/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * TCP (DPVS src/ipvs/ip_vs_proto_tcp.c). In FullNAT the client's sequence numbers move by fnat_seq.delta, chosen at its
 * SYN so that the server sees a number hashed from the local side; the timestamps option of the SYN is blanked; the
 * client's address goes along as an option (TOA) in segments that acknowledge the server's first byte. A session that
 * runs out ESTABLISHED resets both sides. An acknowledgement for a service that belongs to no session is reset.
 */
#include <stdlib.h>
#include <time.h>

#include <rte_jhash.h>

#include "twin.h"

enum { OPT_EOL = 0, OPT_NOP = 1, OPT_MSS = 2, OPT_SACK = 5, OPT_TS = 8, OPT_TOA = 254 };
enum { OLEN_MSS = 4, OLEN_TS = 10, OLEN_TOA4 = 8, OLEN_TOA6 = 20 };

enum {
    sNO = DPVS_TCP_S_NONE,
    sES = DPVS_TCP_S_ESTABLISHED,
    sSS = DPVS_TCP_S_SYN_SENT,
    sSR = DPVS_TCP_S_SYN_RECV,
    sFW = DPVS_TCP_S_FIN_WAIT,
    sTW = DPVS_TCP_S_TIME_WAIT,
    sCL = DPVS_TCP_S_CLOSE,
    sCW = DPVS_TCP_S_CLOSE_WAIT,
    sLA = DPVS_TCP_S_LAST_ACK,
    sLI = DPVS_TCP_S_LISTEN,
    sSA = DPVS_TCP_S_SYNACK,
};

enum { FLAG_SYN, FLAG_FIN, FLAG_ACK, FLAG_RST };
enum { SEEN_INBOUND, SEEN_OUTBOUND, SEEN_ONE_WAY };

/* [who sent it][which flag][state before] = state after; one way is DR and tunnel, where answers pass us by */
static const uint8_t transitions[3][4][DPVS_TCP_S_LAST] = {
    /*             NO   ES   SS   SR   FW   TW   CL   CW   LA   LI   SA */
    {/* syn */ {sSR, sES, sES, sSR, sSR, sSR, sSR, sSR, sSR, sSR, sSR},
     /* fin */ {sCL, sCW, sSS, sTW, sTW, sTW, sCL, sCW, sLA, sLI, sTW},
     /* ack */ {sCL, sES, sSS, sES, sFW, sTW, sCL, sCW, sCL, sLI, sES},
     /* rst */ {sCL, sCL, sCL, sSR, sCL, sCL, sCL, sCL, sLA, sLI, sSR}},
    {/* syn */ {sSS, sES, sSS, sSR, sSS, sSS, sSS, sSS, sSS, sLI, sSR},
     /* fin */ {sTW, sFW, sSS, sTW, sFW, sTW, sCL, sTW, sLA, sLI, sTW},
     /* ack */ {sES, sES, sSS, sES, sFW, sTW, sCL, sCW, sLA, sES, sES},
     /* rst */ {sCL, sCL, sSS, sCL, sCL, sTW, sCL, sCL, sCL, sCL, sCL}},
    {/* syn */ {sSR, sES, sES, sSR, sSR, sSR, sSR, sSR, sSR, sSR, sSR},
     /* fin */ {sCL, sFW, sSS, sTW, sFW, sTW, sCL, sCW, sLA, sLI, sTW},
     /* ack */ {sCL, sES, sSS, sES, sFW, sTW, sCL, sCW, sCL, sLI, sES},
     /* rst */ {sCL, sCL, sCL, sSR, sCL, sCL, sCL, sCL, sLA, sLI, sCL}},
};

char twin_quiet;

static uint32_t secret;

struct tcphdr *tcp_header(int af, const struct rte_mbuf *mbuf)
{
    int offset = ip_hdrlen(af, mbuf);
    struct tcphdr *th = mbuf_header(mbuf, offset, sizeof(*th));

    return th && th->doff >= 5 ? mbuf_header(mbuf, offset, th->doff * 4) : NULL;
}

static void tcp_checksum(int af, struct rte_mbuf *mbuf, struct tcphdr *th)
{
    th->check = 0;
    th->check = l4_csum(af, mbuf, th);
}

/* The packet's length has changed by that much. */
static void grow(int af, struct rte_mbuf *mbuf, int by)
{
    if (af == AF_INET)
        ip4_hdr(mbuf)->total_length = htons((uint16_t)(ntohs(ip4_hdr(mbuf)->total_length) + by));
    else
        ip6_hdr(mbuf)->payload_len = htons((uint16_t)(ntohs(ip6_hdr(mbuf)->payload_len) + by));
}

static uint32_t moved(uint32_t be, uint32_t by)
{
    return htonl(ntohl(be) + by);
}

/* The first option of that kind and length (0: any), or NULL. */
static uint8_t *find_option(struct tcphdr *th, int kind, int len)
{
    uint8_t *at = (uint8_t *)(th + 1), *end = (uint8_t *)th + th->doff * 4;

    while (at < end && *at != OPT_EOL) {
        if (*at == OPT_NOP) {
            at++;
            continue;
        }
        if (at + 1 >= end || at[1] < 2 || at + at[1] > end)
            return NULL;
        if (*at == kind && (len == 0 || at[1] == len))
            return at;
        at += at[1];
    }
    return NULL;
}

static void move_sack(struct tcphdr *th, uint32_t by)
{
    uint8_t *opt = find_option(th, OPT_SACK, 0);

    for (int i = 2; opt && i + 4 <= opt[1]; i += 4) {
        uint32_t edge;
        memcpy(&edge, opt + i, sizeof(edge));
        edge = moved(edge, by);
        memcpy(opt + i, &edge, sizeof(edge));
    }
}

/* Inbound. */

/* A hash of the local side plus a clock of 64 ns, as kernels choose theirs. */
static uint32_t initial_sequence(const struct dp_vs_conn *conn)
{
    uint32_t words[4] = {conn->laddr.in.s_addr, conn->daddr.in.s_addr, (uint32_t)conn->lport << 16 | conn->dport,
                         secret};
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return rte_jhash_32b(words, RTE_DIM(words), secret) +
           (uint32_t)(((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec) >> 6);
}

/* Once a session: a client that reuses a session in TIME_WAIT keeps its delta (as in DPVS). */
static void init_sequence(struct dp_vs_conn *conn, const struct tcphdr *th)
{
    if (conn->fnat_seq.isn)
        return;
    conn->fnat_seq.isn = initial_sequence(conn);
    conn->fnat_seq.delta = conn->fnat_seq.isn - ntohl(th->seq);
}

static void blank_timestamps(struct tcphdr *th)
{
    uint8_t *opt = find_option(th, OPT_TS, OLEN_TS);

    if (opt)
        memset(opt, OPT_NOP, OLEN_TS);
}

static int toa_length(const struct dp_vs_conn *conn)
{
    return conn->af == AF_INET ? OLEN_TOA4 : OLEN_TOA6;
}

/* Left out, not forced in by pruning other options, when the segment has no room. */
static void add_toa(const struct dp_vs_conn *conn, struct rte_mbuf *mbuf, struct tcphdr *th)
{
    uint8_t *options = (uint8_t *)(th + 1), *tail;
    size_t behind = rte_pktmbuf_data_len(mbuf) - (size_t)(options - rte_pktmbuf_mtod(mbuf, uint8_t *));
    int length = toa_length(conn);

    if (mbuf->pkt_len + (unsigned)length > twin_port->mtu || th->doff * 4 + length > 60)
        return;
    tail = (uint8_t *)rte_pktmbuf_append(mbuf, (uint16_t)length);
    if (!tail)
        return;
    memmove(options + length, options, behind);
    options[0] = OPT_TOA;
    options[1] = (uint8_t)length;
    memcpy(options + 2, &conn->cport, 2);
    memcpy(options + 4, &conn->caddr, (size_t)length - 4);
    th->doff = (th->doff + length / 4) & 0xf;
    grow(tuplehash_out(conn).af, mbuf, length);
}

static int tcp_fnat_in(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    int af = tuplehash_out(conn).af;
    struct tcphdr *th = tcp_header(af, mbuf);

    if (!th)
        return EDPVS_INVPKT;
    if (th->syn && !th->ack) {
        blank_timestamps(th);
        init_sequence(conn, th);
    }
    if (ntohl(th->ack_seq) == conn->fnat_seq.fdata_seq && !th->syn && !th->rst) {
        if (conn->pp_version && !conn->pp_sent)
            return EDPVS_INVPKT; /* the real server waits for a header of the proxy protocol, which is not to be had */
        add_toa(conn, mbuf, th);
    }
    th->seq = moved(th->seq, conn->fnat_seq.delta);
    if (conn->syn_proxy_seq.delta) {
        th->ack_seq = moved(th->ack_seq, -conn->syn_proxy_seq.delta);
        move_sack(th, -conn->syn_proxy_seq.delta);
    }
    th->source = conn->lport;
    th->dest = conn->dport;
    tcp_checksum(af, mbuf, th);
    return EDPVS_OK;
}

/* NAT keeps the sequence numbers. */
static int tcp_nat_in(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    struct tcphdr *th = tcp_header(conn->af, mbuf);

    if (!th)
        return EDPVS_INVPKT;
    th->dest = conn->dport;
    tcp_checksum(conn->af, mbuf, th);
    return EDPVS_OK;
}

static int tcp_nat_out(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    struct tcphdr *th = tcp_header(conn->af, mbuf);

    if (!th)
        return EDPVS_INVPKT;
    th->source = conn->vport;
    tcp_checksum(conn->af, mbuf, th);
    return EDPVS_OK;
}

/* Outbound. */

/* The server's next byte and what it has acknowledged, network order, as it sent them: for resets. */
void tcp_save_server(struct dp_vs_conn *conn, const struct rte_mbuf *mbuf, const struct tcphdr *th)
{
    uint32_t used;

    if (th->rst)
        return;
    if (conn->rs_end_ack && (int32_t)(ntohl(th->ack_seq) - ntohl(conn->rs_end_ack)) < 0)
        return;
    used = th->syn && th->ack ? 1 : mbuf->pkt_len - (uint32_t)ip_hdrlen(conn->af, mbuf) - th->doff * 4u;
    conn->rs_end_seq = moved(th->seq, used);
    conn->rs_end_ack = th->ack_seq;
}

/* Room for the TOA in the client's full segments. */
static void lower_mss(struct tcphdr *th, int by)
{
    uint8_t *opt = find_option(th, OPT_MSS, OLEN_MSS);
    uint16_t mss;

    if (!opt)
        return;
    memcpy(&mss, opt + 2, sizeof(mss));
    mss = htons((uint16_t)(ntohs(mss) - by));
    memcpy(opt + 2, &mss, sizeof(mss));
}

static int tcp_fnat_out(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    int af = tuplehash_in(conn).af;
    struct tcphdr *th = tcp_header(af, mbuf);
    uint32_t window;

    if (!th)
        return EDPVS_INVPKT;
    tcp_save_server(conn, mbuf, th);
    th->source = conn->vport;
    th->dest = conn->cport;
    window = ((uint32_t)ntohs(th->window) << conn->wscale_rs) >> conn->wscale_vs;
    th->window = htons((uint16_t)RTE_MIN(window, 0xffffu));
    if (th->syn && th->ack)
        lower_mss(th, toa_length(conn));
    th->seq = moved(th->seq, conn->syn_proxy_seq.delta);
    th->ack_seq = moved(th->ack_seq, -conn->fnat_seq.delta);
    move_sack(th, -conn->fnat_seq.delta);
    if (th->syn && th->ack)
        conn->fnat_seq.fdata_seq = ntohl(th->seq) + 1;
    tcp_checksum(af, mbuf, th);
    return EDPVS_OK;
}

/* Sessions. */

int tcp_send_back(int af, struct rte_mbuf *mbuf, struct tcphdr *th, uint32_t cut)
{
    struct rte_ether_hdr *eth;
    struct rte_ether_addr mac;
    uint8_t *from, *to, address[16];
    size_t length = af == AF_INET ? 4 : 16;
    uint16_t port;

    if (mbuf->l2_len != sizeof(*eth) || rte_pktmbuf_trim(mbuf, (uint16_t)cut) != 0)
        return INET_DROP;
    port = th->source;
    th->source = th->dest;
    th->dest = port;

    from = af == AF_INET ? (uint8_t *)&ip4_hdr(mbuf)->src_addr : (uint8_t *)&ip6_hdr(mbuf)->src_addr;
    to = af == AF_INET ? (uint8_t *)&ip4_hdr(mbuf)->dst_addr : (uint8_t *)&ip6_hdr(mbuf)->dst_addr;
    memcpy(address, from, length);
    memcpy(from, to, length);
    memcpy(to, address, length);
    grow(af, mbuf, -(int)cut);
    tcp_checksum(af, mbuf, th);
    if (af == AF_INET) {
        ip4_hdr(mbuf)->type_of_service = 0;
        ip4_hdr(mbuf)->time_to_live = 63;
        ip4_send_csum(ip4_hdr(mbuf));
    } else {
        ip6_hdr(mbuf)->hop_limits = 63;
    }

    eth = (struct rte_ether_hdr *)rte_pktmbuf_prepend(mbuf, sizeof(*eth)); /* it is still there */
    if (!eth)
        return INET_DROP;
    mac = eth->src_addr;
    eth->src_addr = eth->dst_addr;
    eth->dst_addr = mac;
    net_xmit(mbuf);
    return INET_STOLEN;
}

/*
 * DPVS takes any acknowledgement without a session for the last step of a SYN proxy's handshake, whether the service has
 * one or not, and resets it when the cookie in it is wrong (ip_vs_synproxy.c). Without a SYN proxy no cookie is right. The
 * reset is the segment itself, without its data, sent back the way it came.
 */
static int reset_ack(int af, struct rte_mbuf *mbuf)
{
    struct tcphdr *th = tcp_header(af, mbuf);
    uint32_t payload, acked;

    if (!th)
        return INET_DROP;
    payload = mbuf->pkt_len - (uint32_t)ip_hdrlen(af, mbuf) - th->doff * 4u;
    acked = th->ack_seq;
    th->ack_seq = moved(th->seq, payload);
    th->seq = acked;
    th->psh = 0;
    th->rst = 1;
    th->window = 0;
    this_stats->bad_acks++;
    return tcp_send_back(af, mbuf, th, payload);
}

static int tcp_conn_sched(struct dp_vs_proto *proto __rte_unused, const struct dp_vs_iphdr *iph, struct rte_mbuf *mbuf,
                          struct dp_vs_conn **conn, int *verdict)
{
    const struct tcphdr *th = mbuf_header(mbuf, iph->len, sizeof(*th));
    struct dp_vs_service *svc;

    *verdict = INET_DROP;
    if (!th)
        return EDPVS_INVPKT;
    *verdict = INET_ACCEPT;
    svc = dp_vs_service_lookup(iph->af, iph->proto, &iph->daddr, th->dest, 0, mbuf, NULL, (lcoreid_t)rte_lcore_id());
    if (svc && svc->flags & DP_VS_SVC_F_SYNPROXY && synproxy_step(svc, iph, mbuf, verdict))
        return EDPVS_PKTSTOLEN;
    if (svc && th->ack && !th->syn && !th->fin && !th->rst) {
        *verdict = reset_ack(iph->af, mbuf);
        return EDPVS_PKTSTOLEN;
    }
    if (!th->syn || th->ack || th->fin || th->rst)
        return EDPVS_INVAL;
    if (!svc)
        return EDPVS_NOSERV;
    *verdict = INET_DROP;
    *conn = dp_vs_schedule(svc, iph, mbuf, false);
    return *conn ? EDPVS_OK : EDPVS_RESOURCE;
}

static struct dp_vs_conn *tcp_conn_lookup(struct dp_vs_proto *proto __rte_unused, const struct dp_vs_iphdr *iph,
                                          struct rte_mbuf *mbuf, int *direct, bool reverse, bool *drop __rte_unused,
                                          lcoreid_t *peer_cid)
{
    return proto_lookup(iph, mbuf, direct, reverse, peer_cid);
}

void tcp_mark_established(struct dp_vs_conn *conn)
{
    conn_enter(&dp_vs_proto_tcp, conn, DPVS_TCP_S_ESTABLISHED, DPVS_TCP_S_ESTABLISHED);
}

static int tcp_state_trans(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf, int dir)
{
    int af = dir == DPVS_CONN_DIR_INBOUND ? tuplehash_in(conn).af : tuplehash_out(conn).af;
    const struct tcphdr *th = mbuf_header(mbuf, ip_hdrlen(af, mbuf), sizeof(*th));
    enum dpvs_fwd_mode mode = conn->dest->fwdmode;
    int seen = dir == DPVS_CONN_DIR_INBOUND ? SEEN_INBOUND : SEEN_OUTBOUND;
    uint16_t state = DPVS_TCP_S_CLOSE;

    if (!th)
        return EDPVS_INVPKT;
    if (mode == DPVS_FWD_MODE_DR || mode == DPVS_FWD_MODE_TUNNEL)
        seen = SEEN_ONE_WAY;
    assert(conn->state < DPVS_TCP_S_LAST);
    if (th->rst || th->syn || th->fin || th->ack) {
        int flag = th->rst ? FLAG_RST : th->syn ? FLAG_SYN : th->fin ? FLAG_FIN : FLAG_ACK;
        state = transitions[seen][flag][conn->state];
        if (flag == FLAG_SYN && seen == SEEN_INBOUND && conn->state == DPVS_TCP_S_TIME_WAIT)
            this_stats->reused++;
    }
    if (state != conn->state)
        conn_enter(proto, conn, state, DPVS_TCP_S_ESTABLISHED);
    return EDPVS_OK;
}

/* An IP header with addresses for a TCP header alone. */
static bool put_ip_header(int af, struct rte_mbuf *mbuf, const union inet_addr *from, const union inet_addr *to)
{
    size_t length = af == AF_INET ? sizeof(struct rte_ipv4_hdr) : sizeof(struct rte_ipv6_hdr);
    void *header = rte_pktmbuf_prepend(mbuf, (uint16_t)length);

    if (!header)
        return false;
    memset(header, 0, length);
    if (af == AF_INET) {
        struct rte_ipv4_hdr *iph = header;

        iph->version_ihl = 0x45;
        iph->total_length = htons((uint16_t)mbuf->pkt_len);
        iph->fragment_offset = htons(RTE_IPV4_HDR_DF_FLAG);
        iph->time_to_live = 64;
        iph->next_proto_id = IPPROTO_TCP;
        iph->src_addr = from->in.s_addr;
        iph->dst_addr = to->in.s_addr;
    } else {
        struct rte_ipv6_hdr *iph = header;

        iph->vtc_flow = htonl(6u << 28);
        iph->payload_len = htons((uint16_t)(mbuf->pkt_len - length));
        iph->proto = IPPROTO_TCP;
        iph->hop_limits = 64;
        memcpy(&iph->src_addr, from, 16);
        memcpy(&iph->dst_addr, to, 16);
    }
    return true;
}

struct rte_mbuf *tcp_make(const struct dp_vs_conn *conn, int dir, struct tcphdr **header)
{
    bool inbound = dir == DPVS_CONN_DIR_INBOUND;
    struct rte_mbuf *mbuf = twin_port->mbuf_pool ? rte_pktmbuf_alloc(twin_port->mbuf_pool) : NULL;
    struct tcphdr *th;

    if (!mbuf)
        return NULL;
    mbuf->l2_len = 0; /* no Ethernet header to learn addresses from */
    th = *header = (struct tcphdr *)rte_pktmbuf_append(mbuf, sizeof(*th));
    if (!th || !put_ip_header(inbound ? tuplehash_in(conn).af : tuplehash_out(conn).af, mbuf,
                              inbound ? &conn->caddr : &conn->daddr, inbound ? &conn->vaddr : &conn->laddr)) {
        rte_pktmbuf_free(mbuf);
        return NULL;
    }
    memset(th, 0, sizeof(*th));
    th->source = inbound ? conn->cport : conn->dport;
    th->dest = inbound ? conn->vport : conn->lport;
    th->doff = sizeof(*th) / 4;
    return mbuf;
}

/* Resets are packets as the other side would have sent them, put through the session's own translation. */
static int send_reset(struct dp_vs_proto *proto, struct dp_vs_conn *conn, int dir)
{
    bool inbound = dir == DPVS_CONN_DIR_INBOUND;
    struct rte_mbuf *mbuf;
    struct tcphdr *th;

    if (conn->state != DPVS_TCP_S_ESTABLISHED || !twin_port->mbuf_pool)
        return EDPVS_OK;
    mbuf = tcp_make(conn, dir, &th);
    if (!mbuf)
        return EDPVS_NOMEM;
    th->seq = conn->rs_end_seq;
    if (inbound) {
        bool fnat = conn->dest->fwdmode == DPVS_FWD_MODE_FNAT;
        th->seq = moved(conn->rs_end_ack, fnat ? -conn->fnat_seq.delta : 0);
    }
    th->rst = 1;
    this_stats->resets++;
    return inbound ? conn->packet_xmit(proto, conn, mbuf) : conn->packet_out_xmit(proto, conn, mbuf);
}

static int tcp_conn_expire(struct dp_vs_proto *proto, struct dp_vs_conn *conn)
{
    enum dpvs_fwd_mode mode = conn->dest->fwdmode;

    if (mode != DPVS_FWD_MODE_FNAT && mode != DPVS_FWD_MODE_SNAT && mode != DPVS_FWD_MODE_NAT)
        return EDPVS_OK;
    if (conn->prot_data == &twin_quiet)
        return EDPVS_OK;
    send_reset(proto, conn, DPVS_CONN_DIR_INBOUND);
    send_reset(proto, conn, DPVS_CONN_DIR_OUTBOUND);
    return EDPVS_OK;
}

static int tcp_expire_quiescent(struct dp_vs_conn *conn)
{
    dp_vs_conn_expire_now(conn);
    return EDPVS_OK;
}

static int tcp_init(struct dp_vs_proto *proto)
{
    secret = (uint32_t)random();
    proto->timeout_table = twin_tcp_timeouts;
    return EDPVS_OK;
}

struct dp_vs_proto dp_vs_proto_tcp = {
    .name = "TCP",
    .proto = IPPROTO_TCP,
    .init = tcp_init,
    .conn_sched = tcp_conn_sched,
    .conn_lookup = tcp_conn_lookup,
    .conn_expire = tcp_conn_expire,
    .conn_expire_quiescent = tcp_expire_quiescent,
    .nat_in_handler = tcp_nat_in,
    .nat_out_handler = tcp_nat_out,
    .fnat_in_handler = tcp_fnat_in,
    .fnat_out_handler = tcp_fnat_out,
    .state_trans = tcp_state_trans,
};
