/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the twin shares with DPVS 1.10.2 (default config.mk): struct layouts, constants, exported names and signatures.
 * Every size and offset is asserted in layout.c against the numbers of probes/layouts; nothing of the twin's own is
 * here.
 */
#ifndef TWIN_DPVS_H
#define TWIN_DPVS_H

#include <net/if.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <rte_atomic.h>
#include <rte_common.h>
#include <rte_ethdev.h>
#include <rte_ether.h>
#include <rte_mbuf.h>
#include <rte_mempool.h>
#include <rte_per_lcore.h>
#include <rte_spinlock.h>

#include "list.h"

#define DPVS_MAX_LCORE 64
#define DPVS_MAX_SOCKET 2

typedef uint8_t lcoreid_t;
typedef uint16_t portid_t;
typedef uint32_t sockoptid_t;
typedef uint32_t msgid_t;
typedef uint32_t dpvs_tick_t;

/* include/conf/common.h */
enum {
    EDPVS_OK = 0,
    EDPVS_INVAL = -1,
    EDPVS_NOMEM = -2,
    EDPVS_EXIST = -3,
    EDPVS_NOTEXIST = -4,
    EDPVS_INVPKT = -5,
    EDPVS_DROP = -6,
    EDPVS_NOPROT = -7,
    EDPVS_NOROUTE = -8,
    EDPVS_DEFRAG = -9,
    EDPVS_FRAG = -10,
    EDPVS_DPDKAPIFAIL = -11,
    EDPVS_IDLE = -12,
    EDPVS_BUSY = -13,
    EDPVS_NOTSUPP = -14,
    EDPVS_RESOURCE = -15,
    EDPVS_OVERLOAD = -16,
    EDPVS_NOSERV = -17,
    EDPVS_DISABLED = -18,
    EDPVS_NOROOM = -19,
    EDPVS_NONEALCORE = -20,
    EDPVS_CALLBACKFAIL = -21,
    EDPVS_IO = -22,
    EDPVS_MSG_FAIL = -23,
    EDPVS_MSG_DROP = -24,
    EDPVS_PKTSTOLEN = -25,
    EDPVS_SYSCALL = -26,
    EDPVS_NODEV = -27,
    EDPVS_KNICONTINUE = 1,
    EDPVS_INPROGRESS = 2,
};

typedef enum {
    DPVS_STATE_STOP = 1,
    DPVS_STATE_INIT,
    DPVS_STATE_NORMAL,
    DPVS_STATE_FINISH,
} dpvs_state_t;

void dpvs_state_set(dpvs_state_t state);
dpvs_state_t dpvs_state_get(void);
const char *dpvs_strerror(int err);

union inet_addr {
    struct in_addr in;
    struct in6_addr in6;
};

/* include/global_data.h, include/scheduler.h */
typedef enum dpvs_lcore_role_type {
    LCORE_ROLE_IDLE,
    LCORE_ROLE_MASTER,
    LCORE_ROLE_FWD_WORKER,
    LCORE_ROLE_ISOLRX_WORKER,
    LCORE_ROLE_KNI_WORKER,
    LCORE_ROLE_MAX
} dpvs_lcore_role_t;

typedef enum dpvs_lcore_job_type {
    LCORE_JOB_INIT,
    LCORE_JOB_LOOP,
    LCORE_JOB_SLOW,
    LCORE_JOB_TYPE_MAX
} dpvs_lcore_job_t;

struct dpvs_lcore_job {
    char name[32];
    void (*func)(void *arg);
    void *data;
    dpvs_lcore_job_t type;
    uint32_t skip_loops;
    struct list_head list;
} __rte_cache_aligned;

extern uint64_t g_cycles_per_sec;
extern dpvs_lcore_role_t g_lcore_role[DPVS_MAX_LCORE];
extern int g_lcore_index2id[DPVS_MAX_LCORE];
extern int g_lcore_id2index[DPVS_MAX_LCORE];
extern int g_lcore_num;
extern lcoreid_t g_master_lcore_id;
extern uint8_t g_slave_lcore_num;
extern uint64_t g_slave_lcore_mask;
extern char *dpvs_conf_file;
extern char *dpvs_pid_file;
extern char *dpvs_ipc_file;
extern unsigned int g_version;

void dpvs_lcore_job_init(struct dpvs_lcore_job *job, char *name, dpvs_lcore_job_t type, void (*func)(void *arg),
                         uint32_t skip_loops);
int dpvs_lcore_job_register(struct dpvs_lcore_job *job, dpvs_lcore_role_t role);
int dpvs_lcore_job_unregister(struct dpvs_lcore_job *job, dpvs_lcore_role_t role);
int dpvs_lcore_start(int is_master);
void netif_get_slave_lcores(uint8_t *nb, uint64_t *mask);
bool netif_lcore_is_fwd_worker(lcoreid_t cid);

/* include/timer.h */
enum { DTIMER_OK = 0, DTIMER_STOP };

typedef int (*dpvs_timer_cb_t)(void *arg);

struct dpvs_timer {
    struct list_head list;
    dpvs_timer_cb_t handler;
    void *priv;
    bool is_period;
    dpvs_tick_t delay;
    dpvs_tick_t left;
};

dpvs_tick_t timeval_to_ticks(const struct timeval *tv);
void ticks_to_timeval(const dpvs_tick_t ticks, struct timeval *tv);
int dpvs_timer_init(void);
int dpvs_timer_sched(struct dpvs_timer *timer, struct timeval *delay, dpvs_timer_cb_t handler, void *arg, bool global);
int dpvs_timer_sched_nolock(struct dpvs_timer *timer, struct timeval *delay, dpvs_timer_cb_t handler, void *arg,
                            bool global);
int dpvs_timer_sched_abs(struct dpvs_timer *timer, struct timeval *expire, dpvs_timer_cb_t handler, void *arg,
                         bool global);
int dpvs_timer_sched_abs_nolock(struct dpvs_timer *timer, struct timeval *expire, dpvs_timer_cb_t handler, void *arg,
                                bool global);
int dpvs_timer_sched_period(struct dpvs_timer *timer, struct timeval *intv, dpvs_timer_cb_t handler, void *arg,
                            bool global);
int dpvs_timer_sched_period_nolock(struct dpvs_timer *timer, struct timeval *intv, dpvs_timer_cb_t handler, void *arg,
                                   bool global);
int dpvs_timer_cancel(struct dpvs_timer *timer, bool global);
int dpvs_timer_cancel_nolock(struct dpvs_timer *timer, bool global);
int dpvs_timer_reset(struct dpvs_timer *timer, bool global);
int dpvs_timer_reset_nolock(struct dpvs_timer *timer, bool global);
int dpvs_timer_update(struct dpvs_timer *timer, struct timeval *delay, bool global);
int dpvs_timer_update_nolock(struct dpvs_timer *timer, struct timeval *delay, bool global);
int dpvs_time_now(struct timeval *now, bool global);
int dpvs_time_now_nolock(struct timeval *now, bool global);
void dpvs_time_rand_delay(struct timeval *tv, long delay_us);
int dpvs_timer_sched_interval_get(void);

/* include/netif.h: only the head of the struct is DPVS's, the rest is private on both sides */
struct netif_port {
    char name[IFNAMSIZ];
    portid_t id;
    int type;
    uint16_t flag;
    int nrxq;
    int ntxq;
    struct rte_ether_addr addr;
    uint16_t mtu;
    struct rte_mempool *mbuf_pool;
    struct inet_device *in_ptr;
};

struct netif_port *netif_port_get(portid_t id);
struct netif_port *netif_port_get_by_name(const char *name);

struct netif_flow_handler {
    portid_t pid;
    void *handler;
};

/* include/inetaddr.h, include/conf/inetaddr.h */
#define IFA_F_SAPOOL 0x10000

struct inet_device {
    struct netif_port *dev;
    struct list_head ifa_list[DPVS_MAX_LCORE];
    struct list_head ifm_list[DPVS_MAX_LCORE];
    uint32_t ifa_cnt[DPVS_MAX_LCORE];
    uint32_t ifm_cnt[DPVS_MAX_LCORE];
    rte_atomic32_t refcnt;
    uint32_t flags;
};

struct sa_pool;

struct inet_ifaddr {
    struct list_head d_list;
    struct list_head h_list;
    struct inet_device *idev;
    int af;
    union inet_addr addr;
    uint8_t plen;
    union inet_addr mask;
    union inet_addr bcast;
    uint8_t scope;
    uint32_t flags;
    rte_atomic32_t refcnt;
    uint32_t valid_lft;
    uint32_t prefered_lft;
    struct dpvs_timer timer;
    struct timeval tstemp;
    struct timeval cstemp;
    int state;
    uint8_t dad_probes;
    struct dpvs_timer dad_timer;
    struct sa_pool *sa_pool;
};

struct inet_ifaddr *inet_addr_ifa_get(int af, const struct netif_port *dev, union inet_addr *addr);
struct inet_ifaddr *inet_addr_ifa_get_expired(int af, const struct netif_port *dev, union inet_addr *addr);
void inet_addr_ifa_put(struct inet_ifaddr *ifa);
struct netif_port *inet_addr_get_iface(int af, union inet_addr *addr);

/* include/sa_pool.h; the misspelt members are DPVS's */
#define MAX_PORT 65536
#define MAX_SA_FLOW 4

enum { SA_F_USED = 0x01 };

struct sa_pool_stats {
    uint32_t used_cnt;
    uint32_t free_cnt;
    uint32_t miss_cnt;
};

struct sa_entry {
    struct list_head list;
    uint32_t flags;
    union inet_addr addr;
    uint16_t port;
};

struct sa_entry_pool {
    struct sa_entry *sa_entries;
    struct list_head used_enties;
    struct list_head free_enties;
    uint16_t used_cnt;
    uint16_t free_cnt;
    uint32_t miss_cnt;
    uint16_t shift;
};

struct sa_pool {
    struct inet_ifaddr *ifa;
    uint16_t low;
    uint16_t high;
    rte_atomic32_t refcnt;
    struct sa_entry_pool *pool_hash;
    uint8_t pool_hash_sz;
    uint32_t flags;
    int flow_num;
    struct netif_flow_handler flows[MAX_SA_FLOW];
};

int sa_pool_init(void);
int sa_pool_create(struct inet_ifaddr *ifa, uint16_t low, uint16_t high);
int sa_pool_destroy(struct inet_ifaddr *ifa);
int sa_fetch(int af, struct netif_port *dev, const struct sockaddr_storage *daddr, struct sockaddr_storage *saddr);
int sa_release(const struct netif_port *dev, const struct sockaddr_storage *daddr,
               const struct sockaddr_storage *saddr);
int get_sa_pool_stats(const struct inet_ifaddr *ifa, struct sa_pool_stats *stats);

/* include/conf/conn.h, include/conf/dest.h, include/conf/stats.h, include/conf/service.h */
enum dpvs_fwd_mode {
    DPVS_FWD_MODE_NAT = 0,
    DPVS_FWD_MODE_TUNNEL = 2,
    DPVS_FWD_MODE_DR = 3,
    DPVS_FWD_MODE_BYPASS = 4,
    DPVS_FWD_MODE_FNAT = 5,
    DPVS_FWD_MODE_SNAT = 6,
};

enum {
    DPVS_CONN_F_SYNPROXY = 0x0010,
    DPVS_CONN_F_EXPIRE_QUIESCENT = 0x0020,
    DPVS_CONN_F_HASHED = 0x0100,
    DPVS_CONN_F_INACTIVE = 0x0200,
    DPVS_CONN_F_TEMPLATE = 0x0400,
    DPVS_CONN_F_ONE_PACKET = 0x0800,
    DPVS_CONN_F_IN_TIMER = 0x1000,
    DPVS_CONN_F_REDIRECT_HASHED = 0x2000,
    DPVS_CONN_F_NOFASTXMIT = 0x4000,
};

enum { DPVS_DEST_F_AVAILABLE = 0x1, DPVS_DEST_F_OVERLOAD = 0x2, DPVS_DEST_F_INHIBITED = 0x4 };
enum { DP_VS_SVC_F_PERSISTENT = 0x1, DP_VS_SVC_F_HASHED = 0x2, DP_VS_SVC_F_ONEPACKET = 0x4, DP_VS_SVC_F_SYNPROXY = 0x8 };

enum { DPVS_CONN_DIR_INBOUND = 0, DPVS_CONN_DIR_OUTBOUND, DPVS_CONN_DIR_MAX };

enum {
    DPVS_TCP_S_NONE = 0,
    DPVS_TCP_S_ESTABLISHED,
    DPVS_TCP_S_SYN_SENT,
    DPVS_TCP_S_SYN_RECV,
    DPVS_TCP_S_FIN_WAIT,
    DPVS_TCP_S_TIME_WAIT,
    DPVS_TCP_S_CLOSE,
    DPVS_TCP_S_CLOSE_WAIT,
    DPVS_TCP_S_LAST_ACK,
    DPVS_TCP_S_LISTEN,
    DPVS_TCP_S_SYNACK,
    DPVS_TCP_S_LAST
};

enum { DPVS_SCTP_S_ESTABLISHED = 8, DPVS_SCTP_S_LAST = 14 };
#ifdef TWIN_BEFORE_1_9_6
enum { DPVS_UDP_S_NORMAL = 0, DPVS_UDP_S_LAST };
#else
enum { DPVS_UDP_S_NONE = 0, DPVS_UDP_S_ONEWAY, DPVS_UDP_S_NORMAL, DPVS_UDP_S_LAST };
#endif

struct dp_vs_stats {
    uint64_t conns;
    uint64_t inpkts;
    uint64_t inbytes;
    uint64_t outpkts;
    uint64_t outbytes;
    uint32_t cps;
    uint32_t inpps;
    uint32_t inbps;
    uint32_t outpps;
    uint32_t outbps;
};

struct dest_check_configs {
    uint8_t types;
    uint8_t dest_down_notice_num;
    uint8_t dest_up_notice_num;
    uint8_t dest_down_wait;
    uint16_t dest_inhibit_min;
    uint16_t dest_inhibit_max;
};

struct dp_vs_match;
struct dp_vs_proto;
struct dp_vs_conn;
struct dp_vs_service;

/* include/ipvs/ipvs.h */
struct dp_vs_iphdr {
    int af;
    int len;
    uint8_t proto;
    union inet_addr saddr;
    union inet_addr daddr;
};

struct dp_vs_seq {
    uint32_t isn;
    uint32_t delta;
    uint32_t fdata_seq;
    uint32_t prev_delta;
};

/* include/ipvs/dest.h */
union dest_check {
    struct {
        uint16_t origin_weight;
        uint16_t down_notice_recvd;
        uint32_t inhibit_duration;
        struct dpvs_timer timer;
    } master;
    struct {
        uint16_t origin_weight;
        uint16_t warm_up_count;
    } slave;
};

struct dp_vs_dest {
    struct list_head n_list;
    int af;
    union inet_addr addr;
    uint16_t port;
    volatile uint16_t flags;
    rte_atomic16_t conn_flags;
    rte_atomic16_t weight;
    rte_atomic32_t refcnt;
    struct dp_vs_stats stats;
    enum dpvs_fwd_mode fwdmode;
    rte_atomic32_t actconns;
    rte_atomic32_t inactconns;
    rte_atomic32_t persistconns;
    uint32_t max_conn;
    uint32_t min_conn;
    uint16_t proto;
    uint16_t vport;
    uint32_t vfwmark;
    struct dp_vs_service *svc;
    union inet_addr vaddr;
    unsigned limit_proportion;
    union dest_check dfc;
} __rte_cache_aligned;

struct dp_vs_dest *dp_vs_dest_lookup(int af, struct dp_vs_service *svc, const union inet_addr *daddr, uint16_t dport);
void dp_vs_dest_put(struct dp_vs_dest *dest, bool timerlock);

/* include/ipvs/sched.h */
struct dp_vs_scheduler {
    struct list_head n_list;
    char *name;
    struct dp_vs_dest *(*schedule)(struct dp_vs_service *svc, const struct rte_mbuf *mbuf,
                                   const struct dp_vs_iphdr *iph);
    int (*init_service)(struct dp_vs_service *svc);
    int (*exit_service)(struct dp_vs_service *svc);
    int (*update_service)(struct dp_vs_service *svc, struct dp_vs_dest *dest, sockoptid_t opt);
} __rte_cache_aligned;

/* include/ipvs/service.h */
struct dp_vs_service {
    struct list_head s_list;
    struct list_head f_list;
    struct list_head m_list;
    rte_atomic32_t refcnt;
    int af;
    uint8_t proto;
    uint8_t proxy_protocol;
    uint16_t port;
    uint32_t fwmark;
    union inet_addr addr;
    struct dp_vs_match *match;
    unsigned flags;
    unsigned timeout;
    unsigned conn_timeout;
    unsigned bps;
    unsigned limit_proportion;
    uint32_t netmask;
    struct list_head dests;
    uint32_t num_dests;
    long weight;
    struct dest_check_configs check_conf;
    struct dp_vs_scheduler *scheduler;
    void *sched_data;
    struct dp_vs_stats stats;
    struct list_head laddr_list;
    struct list_head *laddr_curr;
    uint32_t num_laddrs;
} __rte_cache_aligned;

struct dp_vs_service *dp_vs_service_lookup(int af, uint16_t protocol, const union inet_addr *vaddr, uint16_t vport,
                                           uint32_t fwmark, const struct rte_mbuf *mbuf,
                                           const struct dp_vs_match *match, lcoreid_t cid);
void dp_vs_service_put(struct dp_vs_service *svc);

/* src/ipvs/ip_vs_laddr.c */
struct dp_vs_laddr {
    int af;
    struct list_head list;
    union inet_addr addr;
    rte_atomic32_t refcnt;
    rte_atomic32_t conn_counts;
    struct netif_port *iface;
};

int dp_vs_laddr_bind(struct dp_vs_conn *conn, struct dp_vs_service *svc);
int dp_vs_laddr_unbind(struct dp_vs_conn *conn);

/* include/ipvs/redirect.h */
struct dp_vs_redirect {
    struct list_head list;
    uint8_t af;
    uint8_t proto;
    lcoreid_t cid;
    uint8_t padding;
    union inet_addr saddr;
    union inet_addr daddr;
    uint16_t sport;
    uint16_t dport;
    struct rte_mempool *redirect_pool;
} __rte_cache_aligned;

extern bool dp_vs_redirect_disable;
struct dp_vs_redirect *dp_vs_redirect_alloc(enum dpvs_fwd_mode fwdmode);
void dp_vs_redirect_free(struct dp_vs_conn *conn);
void dp_vs_redirect_hash(struct dp_vs_conn *conn);
void dp_vs_redirect_unhash(struct dp_vs_conn *conn);
void dp_vs_redirect_init(struct dp_vs_conn *conn);
struct dp_vs_redirect *dp_vs_redirect_get(int af, uint16_t proto, const union inet_addr *saddr,
                                          const union inet_addr *daddr, uint16_t sport, uint16_t dport);

/* include/ipvs/conn.h */
struct dp_vs_conn_param {
    int af;
    uint8_t proto;
    const union inet_addr *caddr;
    const union inet_addr *vaddr;
    uint16_t cport;
    uint16_t vport;
    uint16_t ct_dport;
};

struct conn_tuple_hash {
    struct list_head list;
    int direct;
    int af;
    uint8_t proto;
    union inet_addr saddr;
    union inet_addr daddr;
    uint16_t sport;
    uint16_t dport;
} __rte_cache_aligned;

struct dp_vs_conn {
    int af;
    uint8_t proto;
    union inet_addr caddr;
    union inet_addr vaddr;
    union inet_addr laddr;
    union inet_addr daddr;
    uint16_t cport;
    uint16_t vport;
    uint16_t lport;
    uint16_t dport;
    struct rte_mempool *connpool;
    struct conn_tuple_hash tuplehash[DPVS_CONN_DIR_MAX];
    rte_atomic32_t refcnt;
    struct dpvs_timer timer;
    struct timeval timeout;
    lcoreid_t lcore;
    struct dp_vs_dest *dest;
    void *prot_data;
    struct dp_vs_laddr *local;
    struct dp_vs_seq fnat_seq;
    uint32_t rs_end_seq;
    uint32_t rs_end_ack;
    int (*packet_xmit)(struct dp_vs_proto *prot, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
    int (*packet_out_xmit)(struct dp_vs_proto *prot, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
    struct rte_ether_addr in_smac;
    struct rte_ether_addr in_dmac;
    struct rte_ether_addr out_smac;
    struct rte_ether_addr out_dmac;
    struct netif_port *in_dev;
    struct netif_port *out_dev;
    union inet_addr in_nexthop;
    union inet_addr out_nexthop;
    struct dp_vs_seq syn_proxy_seq;
    struct list_head ack_mbuf;
    uint16_t ack_num;
    uint8_t wscale_vs;
    uint8_t wscale_rs;
    struct rte_mbuf *syn_mbuf;
    rte_atomic32_t syn_retry_max;
    uint32_t last_seq;
    uint32_t last_ack_seq;
    rte_atomic32_t dup_ack_cnt;
    uint8_t pp_version;
    uint8_t pp_sent;
    volatile uint16_t flags;
    volatile uint16_t state;
    volatile uint16_t old_state;
    struct dp_vs_conn *control;
    rte_atomic32_t n_control;
    struct dp_vs_redirect *redirect;
} __rte_cache_aligned;

#define tuplehash_in(c) ((c)->tuplehash[DPVS_CONN_DIR_INBOUND])
#define tuplehash_out(c) ((c)->tuplehash[DPVS_CONN_DIR_OUTBOUND])

struct dp_vs_conn *dp_vs_conn_new(struct rte_mbuf *mbuf, const struct dp_vs_iphdr *iph, struct dp_vs_conn_param *param,
                                  struct dp_vs_dest *dest, uint32_t flags);
struct dp_vs_conn *dp_vs_conn_get(int af, uint16_t proto, const union inet_addr *saddr, const union inet_addr *daddr,
                                  uint16_t sport, uint16_t dport, int *dir, bool reverse);
struct dp_vs_conn *dp_vs_ct_in_get(int af, uint16_t proto, const union inet_addr *saddr, const union inet_addr *daddr,
                                   uint16_t sport, uint16_t dport);
void dp_vs_conn_put(struct dp_vs_conn *conn);
void dp_vs_conn_put_no_reset(struct dp_vs_conn *conn);
unsigned dp_vs_conn_get_timeout(struct dp_vs_conn *conn);
void dp_vs_conn_set_timeout(struct dp_vs_conn *conn, struct dp_vs_proto *pp);
void dp_vs_conn_expire_now(struct dp_vs_conn *conn);
uint32_t dp_vs_conn_hashkey(int af, const union inet_addr *saddr, uint16_t sport, const union inet_addr *daddr,
                            uint16_t dport, uint32_t mask);
int dp_vs_conn_pool_size(void);
int dp_vs_conn_pool_cache_size(void);

/* include/ipvs/proto.h */
struct dp_vs_proto {
    char *name;
    uint8_t proto;
    int *timeout_table;
    int (*init)(struct dp_vs_proto *proto);
    int (*exit)(struct dp_vs_proto *proto);
    int (*conn_sched)(struct dp_vs_proto *proto, const struct dp_vs_iphdr *iph, struct rte_mbuf *mbuf,
                      struct dp_vs_conn **conn, int *verdict);
    struct dp_vs_conn *(*conn_lookup)(struct dp_vs_proto *proto, const struct dp_vs_iphdr *iph, struct rte_mbuf *mbuf,
                                      int *direct, bool reverse, bool *drop, lcoreid_t *peer_cid);
    int (*conn_expire)(struct dp_vs_proto *proto, struct dp_vs_conn *conn);
    int (*conn_expire_quiescent)(struct dp_vs_conn *conn);
    int (*nat_in_handler)(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
    int (*nat_out_handler)(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
    int (*fnat_in_handler)(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
    int (*fnat_out_handler)(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
    int (*fnat_in_pre_handler)(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
    int (*fnat_out_pre_handler)(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
    int (*snat_in_handler)(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
    int (*snat_out_handler)(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
    int (*csum_check)(struct dp_vs_proto *proto, int af, struct rte_mbuf *mbuf);
    int (*dump_packet)(struct dp_vs_proto *proto, int af, struct rte_mbuf *mbuf, int off, const char *msg);
    int (*state_trans)(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf, int direct);
    const char *(*state_name)(int state);
} __rte_cache_aligned;

struct dp_vs_proto *dp_vs_proto_lookup(uint8_t proto);

/* include/ipvs/xmit.h */
int dp_vs_xmit_fnat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
int dp_vs_out_xmit_fnat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
int dp_vs_xmit_dr(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
int dp_vs_xmit_snat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
int dp_vs_out_xmit_snat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
int dp_vs_xmit_nat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
int dp_vs_out_xmit_nat(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);
int dp_vs_xmit_tunnel(struct dp_vs_proto *proto, struct dp_vs_conn *conn, struct rte_mbuf *mbuf);

#include "dpvs_ctrl.h"

#endif
