/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The SYN proxy (DPVS src/ipvs/ip_vs_synproxy.c): the client's handshake is with us, by a cookie; a session is made with
 * its last step, and the real server gets a handshake of its own. What the two sides count from differs from then on:
 * syn_proxy_seq.delta. As simple as a test needs it: no options but the segment size, so no window is scaled; segments of
 * the client that come before the real server has answered are dropped and come again, and so is a lost SYN of ours.
 */
#include <stdlib.h>

#include <rte_jhash.h>

#include "twin.h"

enum { OPT_MSS = 2, OLEN_MSS = 4, WINDOW = 65535, MSS = 1400 };

static uint32_t cookie_of(const struct dp_vs_iphdr *iph, const struct tcphdr *th)
{
    static uint32_t secret;
    size_t length = iph->af == AF_INET ? 4 : 16;

    if (!secret)
        secret = (uint32_t)random() | 1;
    return rte_jhash(&iph->saddr, (uint32_t)length, rte_jhash(&iph->daddr, (uint32_t)length, secret)) ^
           rte_jhash_1word((uint32_t)th->source << 16 | th->dest, secret);
}

/* The client's SYN comes back as our SYN ACK. */
static int answer(const struct dp_vs_iphdr *iph, struct rte_mbuf *mbuf, struct tcphdr *th)
{
    uint8_t *option = (uint8_t *)(th + 1);
    uint32_t keep = (uint32_t)iph->len + sizeof(*th) + OLEN_MSS;

    if (mbuf->pkt_len < keep)
        return INET_DROP;
    th->ack_seq = htonl(ntohl(th->seq) + 1);
    th->seq = htonl(cookie_of(iph, th));
    th->ack = 1;
    th->doff = (sizeof(*th) + OLEN_MSS) / 4;
    th->window = htons(WINDOW);
    option[0] = OPT_MSS;
    option[1] = OLEN_MSS;
    option[2] = MSS >> 8;
    option[3] = MSS & 0xff;
    return tcp_send_back(iph->af, mbuf, th, mbuf->pkt_len - keep);
}

/* A SYN to the real server, as if it was the client's. */
static void begin(struct dp_vs_conn *conn, const struct tcphdr *last)
{
    struct rte_mbuf *mbuf;
    struct tcphdr *th;

    conn->flags |= DPVS_CONN_F_SYNPROXY;
    conn->syn_proxy_seq.isn = htonl(ntohl(last->ack_seq) - 1);
    conn->fnat_seq.fdata_seq = ntohl(last->ack_seq);
    conn_enter(&dp_vs_proto_tcp, conn, DPVS_TCP_S_SYN_SENT, DPVS_TCP_S_ESTABLISHED);
    mbuf = tcp_make(conn, DPVS_CONN_DIR_INBOUND, &th);
    if (!mbuf)
        return;
    th->seq = htonl(ntohl(last->seq) - 1);
    th->syn = 1;
    th->window = htons(WINDOW);
    conn->packet_xmit(&dp_vs_proto_tcp, conn, mbuf);
}

bool synproxy_step(struct dp_vs_service *svc, const struct dp_vs_iphdr *iph, struct rte_mbuf *mbuf, int *verdict)
{
    struct tcphdr *th = tcp_header(iph->af, mbuf);
    struct dp_vs_conn *conn;

    if (!th || th->fin || th->rst || th->syn == th->ack)
        return false;
    if (th->syn) {
        *verdict = answer(iph, mbuf, th);
        return true;
    }
    if (ntohl(th->ack_seq) - 1 != cookie_of(iph, th))
        return false;
    *verdict = INET_DROP;
    conn = dp_vs_schedule(svc, iph, mbuf, true);
    if (conn) {
        begin(conn, th);
        dp_vs_conn_put(conn);
    }
    return true;
}

int synproxy_wait(struct dp_vs_conn *conn, struct rte_mbuf *mbuf, int dir)
{
    struct tcphdr *answered = tcp_header(tuplehash_out(conn).af, mbuf), *th;
    struct rte_mbuf *ack;

    if (dir == DPVS_CONN_DIR_OUTBOUND && answered && answered->rst) {
        conn_enter(&dp_vs_proto_tcp, conn, DPVS_TCP_S_CLOSE, DPVS_TCP_S_ESTABLISHED);
    } else if (dir == DPVS_CONN_DIR_OUTBOUND && answered && answered->syn && answered->ack) {
        conn->syn_proxy_seq.delta = ntohl(conn->syn_proxy_seq.isn) - ntohl(answered->seq);
        tcp_save_server(conn, mbuf, answered);
        conn_enter(&dp_vs_proto_tcp, conn, DPVS_TCP_S_ESTABLISHED, DPVS_TCP_S_ESTABLISHED);
        ack = tcp_make(conn, DPVS_CONN_DIR_INBOUND, &th);
        if (ack) {
            th->seq = htonl(ntohl(answered->ack_seq) - conn->fnat_seq.delta);
            th->ack_seq = htonl(conn->fnat_seq.fdata_seq);
            th->ack = 1;
            th->window = htons(WINDOW);
            conn->packet_xmit(&dp_vs_proto_tcp, conn, ack);
        }
    }
    dp_vs_conn_put(conn);
    return INET_DROP;
}
