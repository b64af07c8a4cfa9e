/* SPDX-License-Identifier: GPL-2.0-or-later */
/* SCTP (DPVS src/ipvs/ip_vs_proto_sctp.c): ports and checksum, and the states that the first chunk of each packet leads to. */
#include <rte_hash_crc.h>
#include <rte_sctp.h>

#include "twin.h"

enum { CHUNKS = 15, EVENTS = 10 };

/* What a chunk is to the states: 0 data, 1 INIT, 2 INIT ACK, 3 COOKIE ECHO, 4 COOKIE ACK, 5 SHUTDOWN, 6 SHUTDOWN ACK,
 * 7 SHUTDOWN COMPLETE, 8 ERROR, 9 ABORT. By chunk type; those above count as data. */
static const uint8_t events[CHUNKS] = {0, 1, 2, 0, 0, 0, 9, 5, 6, 8, 3, 4, 0, 0, 7};

/* States by letter, in DPVS's order: none, init (first, later), cookie (sent, replied, wait, had, echoed), established,
 * shutdown (sent, received, acknowledged), rejected, closed. */
static const char letters[] = "n1isrwceESRAJL";

/* [who sent it][event]: for each state the one that follows; a dot is the same. */
static const char *const next[DPVS_CONN_DIR_MAX][EVENTS] = {
    {"E.............", "1i..........ii", "www..c........", "ri.r..........", "E......E......", "R.......R.....",
     "Li.......L.L..", "LLL........L..", "L......L......", "LLLLLJLLLLLLL."},
    {"E.............", "wwwww.ww.wwwww", "sss...........", "eeeeeee.......", "EEEEEEEE......", "SSSSSSSSS.....",
     "AAAAA....AA...", "L.............", "LLLLL.........", "LJLLLLLLLLLLL."},
};

static int timeouts[DPVS_SCTP_S_LAST + 1] = {2, 4, 61, 61, 61, 61, 61, 61, 900, 61, 61, 61, 4, 61, 2};

static int sctp_conn_sched(struct dp_vs_proto *proto __rte_unused, const struct dp_vs_iphdr *iph, struct rte_mbuf *mbuf,
                           struct dp_vs_conn **conn, int *verdict)
{
    const struct rte_sctp_hdr *sh = mbuf_header(mbuf, iph->len, sizeof(*sh));
    struct dp_vs_service *svc;

    *verdict = INET_DROP;
    if (!sh)
        return EDPVS_INVPKT;
    svc =
        dp_vs_service_lookup(iph->af, iph->proto, &iph->daddr, sh->dst_port, 0, mbuf, NULL, (lcoreid_t)rte_lcore_id());
    if (!svc) {
        *verdict = INET_ACCEPT;
        return EDPVS_NOSERV;
    }
    *conn = dp_vs_schedule(svc, iph, mbuf, false);
    return *conn ? EDPVS_OK : EDPVS_RESOURCE;
}

static struct dp_vs_conn *sctp_conn_lookup(struct dp_vs_proto *proto __rte_unused, const struct dp_vs_iphdr *iph,
                                           struct rte_mbuf *mbuf, int *direct, bool reverse, bool *drop __rte_unused,
                                           lcoreid_t *peer_cid)
{
    return proto_lookup(iph, mbuf, direct, reverse, peer_cid);
}

static uint32_t checksum(const struct rte_mbuf *mbuf, struct rte_sctp_hdr *sh)
{
    uint32_t length = rte_pktmbuf_data_len(mbuf) - (uint32_t)((char *)sh - rte_pktmbuf_mtod(mbuf, char *));
    uint32_t was = sh->cksum, sum;

    sh->cksum = 0;
    sum = ~rte_hash_crc(sh, length, ~0u);
    sh->cksum = was;
    return sum;
}

/* Ports that are 0 stay. A packet whose checksum is wrong goes no further. */
static int rewrite(int af, struct rte_mbuf *mbuf, uint16_t sport, uint16_t dport)
{
    struct rte_sctp_hdr *sh = mbuf_header(mbuf, ip_hdrlen(af, mbuf), sizeof(*sh));

    if (!sh)
        return EDPVS_INVPKT;
    if (sh->cksum != checksum(mbuf, sh))
        return EDPVS_INVAL;
    sh->src_port = sport ? sport : sh->src_port;
    sh->dst_port = dport ? dport : sh->dst_port;
    sh->cksum = checksum(mbuf, sh);
    return EDPVS_OK;
}

static int sctp_fnat_in(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    return rewrite(tuplehash_out(conn).af, mbuf, conn->lport, conn->dport);
}

static int sctp_fnat_out(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    return rewrite(tuplehash_in(conn).af, mbuf, conn->vport, conn->cport);
}

static int sctp_nat_in(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    return rewrite(conn->af, mbuf, 0, conn->dport);
}

static int sctp_nat_out(struct dp_vs_proto *proto __rte_unused, struct dp_vs_conn *conn, struct rte_mbuf *mbuf)
{
    return rewrite(conn->af, mbuf, conn->vport, 0);
}

static int sctp_state_trans(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf, int dir)
{
    int af = dir == DPVS_CONN_DIR_INBOUND ? tuplehash_in(conn).af : tuplehash_out(conn).af;
    const uint8_t *chunk = mbuf_header(mbuf, ip_hdrlen(af, mbuf) + (int)sizeof(struct rte_sctp_hdr), 4);
    char letter;

    if (!chunk)
        return EDPVS_INVPKT;
    assert(conn->state < DPVS_SCTP_S_LAST);
    letter = next[dir][*chunk < CHUNKS ? events[*chunk] : 0][conn->state];
    if (letter != '.')
        conn_enter(proto, conn, (uint16_t)(strchr(letters, letter) - letters), DPVS_SCTP_S_ESTABLISHED);
    dp_vs_conn_set_timeout(conn, proto);
    return EDPVS_OK;
}

static int sctp_expire_quiescent(struct dp_vs_conn *conn)
{
    dp_vs_conn_expire_now(conn);
    return EDPVS_OK;
}

struct dp_vs_proto dp_vs_proto_sctp = {
    .name = "SCTP",
    .proto = IPPROTO_SCTP,
    .timeout_table = timeouts,
    .conn_sched = sctp_conn_sched,
    .conn_lookup = sctp_conn_lookup,
    .conn_expire_quiescent = sctp_expire_quiescent,
    .nat_in_handler = sctp_nat_in,
    .nat_out_handler = sctp_nat_out,
    .fnat_in_handler = sctp_fnat_in,
    .fnat_out_handler = sctp_fnat_out,
    .state_trans = sctp_state_trans,
};
