/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The twin's own insides: what its C files share beyond DPVS's interface. */
#ifndef TWIN_TWIN_H
#define TWIN_TWIN_H

#include <assert.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>

#include <rte_cycles.h>
#include <rte_ip.h>
#include <rte_lcore.h>
#include <rte_log.h>
#include <rte_malloc.h>

#include "dpvs.h"

#define RTE_LOGTYPE_TWIN RTE_LOGTYPE_USER1
#define LOG(level, ...) RTE_LOG(level, TWIN, __VA_ARGS__)

enum { INET_DROP, INET_ACCEPT, INET_STOLEN };

#define PKT_BURST 32

/* conf.c: what the twin reads of dpvs.conf, and its environment */
struct twin_worker_conf {
    bool slave;
    lcoreid_t cid;
    int queue;
};

struct twin_conf {
    struct twin_worker_conf workers[DPVS_MAX_LCORE];
    int nworkers;
    int rx_queues;
    int conn_pool_size;
    int conn_pool_cache;
    int conn_init_timeout;
    bool redirect;
    int schedule_interval_us;
    int msg_ring_size;
    int msg_timeout_us;
    int sa_hash_size;
    bool poll;
    char log_file[256];
};

extern struct twin_conf twin_conf;
extern int twin_tcp_timeouts[DPVS_TCP_S_LAST + 1];
extern int twin_udp_timeouts[DPVS_UDP_S_LAST + 1];
int conf_load(const char *path, bool first);

/* Counters of one lcore; only that lcore writes them. */
struct lcore_stats {
    uint64_t rx;
    uint64_t tx;
    uint64_t dropped;
    uint64_t no_route;
    uint64_t redirected;
    uint64_t resets;
    uint64_t bad_acks;
    uint64_t reused;
    uint64_t synthetic;
    uint64_t synthetic_failed;
    uint64_t longest_round; /* of the loop, in cycles, since it was asked for last; without sleeping */
    uint64_t work; /* anything done: while it moves, the lcore does not sleep */
};

RTE_DECLARE_PER_LCORE(struct lcore_stats, twin_stats);
#define this_stats (&RTE_PER_LCORE(twin_stats))

static inline void twin_worked(void)
{
    this_stats->work++;
}

static inline bool inet_addr_equal(int af, const union inet_addr *a, const union inet_addr *b)
{
    return af == AF_INET ? a->in.s_addr == b->in.s_addr : !memcmp(&a->in6, &b->in6, sizeof(a->in6));
}

static inline bool on_master(void)
{
    return rte_lcore_id() == rte_get_main_lcore();
}

static inline struct rte_ipv4_hdr *ip4_hdr(const struct rte_mbuf *mbuf)
{
    return rte_pktmbuf_mtod(mbuf, struct rte_ipv4_hdr *);
}

static inline int ip4_hdrlen(const struct rte_mbuf *mbuf)
{
    return (ip4_hdr(mbuf)->version_ihl & 0xf) * 4;
}

static inline struct rte_ipv6_hdr *ip6_hdr(const struct rte_mbuf *mbuf)
{
    return rte_pktmbuf_mtod(mbuf, struct rte_ipv6_hdr *);
}

/* Of the packet's IP header; IPv6 comes without extensions (net.c). */
static inline int ip_hdrlen(int af, const struct rte_mbuf *mbuf)
{
    return af == AF_INET ? ip4_hdrlen(mbuf) : (int)sizeof(struct rte_ipv6_hdr);
}

static inline uint16_t ether_type(int af)
{
    return af == AF_INET ? RTE_ETHER_TYPE_IPV4 : RTE_ETHER_TYPE_IPV6;
}

static inline void ip4_send_csum(struct rte_ipv4_hdr *iph)
{
    iph->hdr_checksum = 0;
    iph->hdr_checksum = rte_ipv4_cksum(iph);
}

/* A header of `len` bytes at `offset`, or NULL if the packet ends before; packets here have one segment. */
static inline void *mbuf_header(const struct rte_mbuf *mbuf, int offset, int len)
{
    if (offset < 0 || offset + len > (int)rte_pktmbuf_data_len(mbuf))
        return NULL;
    return rte_pktmbuf_mtod_offset(mbuf, void *, offset);
}

/* The checksum of a TCP or UDP header and what follows, with the field itself 0. */
static inline uint16_t l4_csum(int af, const struct rte_mbuf *mbuf, const void *l4)
{
    return af == AF_INET ? rte_ipv4_udptcp_cksum(ip4_hdr(mbuf), l4) : rte_ipv6_udptcp_cksum(ip6_hdr(mbuf), l4);
}

/* scheduler.c */
int scheduler_init(void);
void twin_set_poll(bool poll);

/* timer.c */
uint64_t twin_ticks(void);

/* msg.c, sockopt.c, common.c */
int msg_init(void);
int sockopt_init(void);
int eal_mem_sockopt_init(void);
void sockopt_term(void);
ssize_t readn(int fd, void *buf, size_t n);
ssize_t sendn(int fd, const void *buf, size_t n, int flags);
int get_numa_nodes(void);
bool is_power2(int num, int offset, int *lower);

/* net.c */
extern struct netif_port *twin_port;
int net_init(void);
int net_start(void);
void net_stop(void);
int net_xmit(struct rte_mbuf *mbuf);
int net_xmit_to(struct rte_mbuf *mbuf, const struct rte_ether_addr *mac, uint16_t type);
int net_output(int af, struct rte_mbuf *mbuf, const union inet_addr *daddr);
bool net_nexthop(int af, const union inet_addr *daddr, union inet_addr *nexthop);
void net_heard(int af, const union inet_addr *addr, const struct rte_ether_addr *mac);
void net_input(struct rte_mbuf **mbufs, uint16_t count);
void net_set_gateway(uint32_t gateway);

/* ndisc.c */
void ndisc_ask(const union inet_addr *source, const union inet_addr *target);
void ndisc_input(struct rte_mbuf *mbuf);

/* inetaddr.c */
int inetaddr_init(void);
int ifa_add(int af, const union inet_addr *addr, uint8_t plen, uint32_t flags);
int ifa_del(int af, const union inet_addr *addr, uint8_t plen);
bool ifa_is_local(int af, const union inet_addr *addr);
bool ifa_source(int af, const union inet_addr *daddr, union inet_addr *source);
void ifa_json(FILE *out);

/* conn.c, conn_ctrl.c */
int dp_vs_conn_init(void);
struct list_head *conn_this_table(void);
uint32_t conn_this_count(void);
int conn_flush_this(void);
/* Move to a state, and with it the server's counters: `active` is the state that counts as such. */
void conn_enter(struct dp_vs_proto *proto, struct dp_vs_conn *conn, uint16_t state, uint16_t active);
int conn_ctrl_init(void);
int conn_dump_templates(int (*dump)(const struct list_head *table));

#define DPVS_CONN_TBL_SIZE (1 << 20)
#define DPVS_CONN_TBL_MASK (DPVS_CONN_TBL_SIZE - 1)

static inline struct dp_vs_conn *tuplehash_to_conn(const struct conn_tuple_hash *t)
{
    return (struct dp_vs_conn *)((char *)(uintptr_t)t - offsetof(struct dp_vs_conn, tuplehash) -
                                 (size_t)t->direct * sizeof(struct conn_tuple_hash));
}

/* redirect.c */
int dp_vs_redirects_init(void);
int dp_vs_redirect_pkt(struct rte_mbuf *mbuf, lcoreid_t peer_cid);
void dp_vs_redirect_ring_proc(lcoreid_t cid);

/* tcp.c, udp.c, sctp.c, core.c */
int dp_vs_proto_init(void);
extern struct dp_vs_proto dp_vs_proto_tcp;
extern struct dp_vs_proto dp_vs_proto_udp;
extern struct dp_vs_proto dp_vs_proto_sctp;
struct dp_vs_conn *proto_lookup(const struct dp_vs_iphdr *iph, struct rte_mbuf *mbuf, int *direct, bool reverse,
                                lcoreid_t *peer_cid);
int dp_vs_in(int af, struct rte_mbuf *mbuf);
struct dp_vs_conn *dp_vs_schedule(struct dp_vs_service *svc, const struct dp_vs_iphdr *iph, struct rte_mbuf *mbuf,
                                  bool is_synproxy_on);
void tcp_mark_established(struct dp_vs_conn *conn);
struct tcphdr *tcp_header(int af, const struct rte_mbuf *mbuf);
void tcp_save_server(struct dp_vs_conn *conn, const struct rte_mbuf *mbuf, const struct tcphdr *th);
/* The segment itself, less `cut` bytes at its end, goes back the way it came; a verdict. */
int tcp_send_back(int af, struct rte_mbuf *mbuf, struct tcphdr *th, uint32_t cut);
/* A segment without data or flags, as that side would send it; NULL without a buffer. */
struct rte_mbuf *tcp_make(const struct dp_vs_conn *conn, int dir, struct tcphdr **header);

/* synproxy.c */
/* A segment without a session for a service with a SYN proxy: false, and untouched, if it is nothing to that. */
bool synproxy_step(struct dp_vs_service *svc, const struct dp_vs_iphdr *iph, struct rte_mbuf *mbuf, int *verdict);
/* A segment of a session whose real server has not answered yet; a verdict. */
int synproxy_wait(struct dp_vs_conn *conn, struct rte_mbuf *mbuf, int dir);

extern char twin_quiet; /* conn->prot_data == &twin_quiet: a synthetic session, which ends without resets */

/* sched.c, service.c */
struct dp_vs_scheduler *dp_vs_scheduler_get(const char *name);
struct list_head *dp_vs_sched_first_dest(const struct dp_vs_service *svc);
int service_init(void);
struct dest_spec {
    int af;
    union inet_addr addr;
    uint16_t port;
    enum dpvs_fwd_mode mode;
    int weight;
    uint32_t max_conn; /* of all workers together */
};

int service_add(int af, int proto, const union inet_addr *vip, uint16_t port, const char *sched);
int service_del(int af, int proto, const union inet_addr *vip, uint16_t port);
int dest_add(struct dp_vs_service *svc, const struct dest_spec *spec, bool edit);
int dest_del(struct dp_vs_service *svc, const struct dest_spec *spec);
struct dp_vs_service *service_first(int proto, enum dpvs_fwd_mode mode);
void service_json(FILE *out);

/* laddr.c */
int dp_vs_laddr_add(struct dp_vs_service *svc, int af, const union inet_addr *addr, const char *ifname);
int dp_vs_laddr_del(struct dp_vs_service *svc, int af, const union inet_addr *addr);
void dp_vs_laddr_flush(struct dp_vs_service *svc);

/* twinctl.c, synthesize.c */
int twinctl_init(void);
int twinctl_run_file(const char *path);
void twinctl_term(void);
int synthesize_init(void);
int synthesize_start(uint64_t count, uint64_t rate, uint32_t lifetime_ms, uint32_t seed);
uint64_t synthesize_pending(void);

#endif
