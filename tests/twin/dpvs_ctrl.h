/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The rest of what dpvs.h declares: messages between lcores and the control socket. */
#ifndef TWIN_DPVS_CTRL_H
#define TWIN_DPVS_CTRL_H

#include "dpvs.h"

/* include/ctrl.h: messages between lcores */
typedef enum msg_mode { DPVS_MSG_UNICAST = 1, DPVS_MSG_MULTICAST } msg_mode_t;
typedef enum msg_priority { MSG_PRIO_IGN = 0, MSG_PRIO_HIGH, MSG_PRIO_NORM, MSG_PRIO_LOW } msg_priority_t;

enum {
    DPVS_MSG_F_ASYNC = 1,
    DPVS_MSG_F_STATE_SEND = 2,
    DPVS_MSG_F_STATE_QUEUE = 4,
    DPVS_MSG_F_STATE_RECV = 8,
    DPVS_MSG_F_STATE_FIN = 16,
    DPVS_MSG_F_STATE_DROP = 32,
    DPVS_MSG_F_CALLBACK_FAIL = 64,
    DPVS_MSG_F_TIMEOUT = 128,
};

enum { MSG_TYPE_REG = 1, MSG_TYPE_UNREG = 2, MSG_TYPE_CONN_GET = 14, MSG_TYPE_CONN_GET_ALL = 15 };

struct dpvs_msg_reply {
    uint32_t len;
    void *data;
};

struct dpvs_msg {
    struct list_head mq_node;
    msgid_t type;
    uint32_t seq;
    msg_mode_t mode;
    lcoreid_t cid;
    uint32_t flags;
    rte_atomic16_t refcnt;
    rte_spinlock_t lock;
    struct dpvs_msg_reply reply;
    uint32_t len;
    char data[0];
};

struct dpvs_multicast_queue {
    msgid_t type;
    uint32_t seq;
    uint64_t mask;
    struct list_head mq;
    struct dpvs_msg *org_msg;
    struct list_head list;
};

typedef int (*UNICAST_MSG_CB)(struct dpvs_msg *);
typedef int (*MULTICAST_MSG_CB)(struct dpvs_multicast_queue *);

struct dpvs_msg_type {
    msgid_t type;
    uint8_t prio;
    lcoreid_t cid;
    msg_mode_t mode;
    UNICAST_MSG_CB unicast_msg_cb;
    MULTICAST_MSG_CB multicast_msg_cb;
    rte_atomic32_t refcnt;
    struct list_head list;
};

int msg_type_register(const struct dpvs_msg_type *msg_type);
int msg_type_unregister(const struct dpvs_msg_type *msg_type);
int msg_type_mc_register(const struct dpvs_msg_type *msg_type);
int msg_type_mc_unregister(const struct dpvs_msg_type *msg_type);
struct dpvs_msg *msg_make(msgid_t type, uint32_t seq, msg_mode_t mode, lcoreid_t cid, uint32_t len, const void *data);
int msg_destroy(struct dpvs_msg **pmsg);
int msg_send(struct dpvs_msg *msg, lcoreid_t cid, uint32_t flags, struct dpvs_msg_reply **reply);
int multicast_msg_send(struct dpvs_msg *msg, uint32_t flags, struct dpvs_multicast_queue **reply);
int msg_slave_process(int step);
void *msg_reply_alloc(int size);
void msg_reply_free(void *mptr);

/* include/ctrl.h: the control socket */
#define SOCKOPT_VERSION 0x00010000u
#define SOCKOPT_ERRSTR_LEN 64

enum sockopt_type { SOCKOPT_GET = 0, SOCKOPT_SET, SOCKOPT_TYPE_MAX };

struct dpvs_sock_msg {
    uint32_t version;
    sockoptid_t id;
    enum sockopt_type type;
    size_t len;
    char data[0];
};

struct dpvs_sock_msg_reply {
    uint32_t version;
    sockoptid_t id;
    enum sockopt_type type;
    int errcode;
    char errstr[SOCKOPT_ERRSTR_LEN];
    size_t len;
    char data[0];
};

struct dpvs_sockopts {
    uint32_t version;
    struct list_head list;
    sockoptid_t set_opt_min;
    sockoptid_t set_opt_max;
    int (*set)(sockoptid_t opt, const void *in, size_t inlen);
    sockoptid_t get_opt_min;
    sockoptid_t get_opt_max;
    int (*get)(sockoptid_t opt, const void *in, size_t inlen, void **out, size_t *outlen);
};

extern const char *dpvs_sockopts_name[];
int sockopt_register(struct dpvs_sockopts *sockopts);
int sockopt_unregister(struct dpvs_sockopts *sockopts);

/* include/conf/conn.h: what the control socket answers about sessions */
#define MAX_CTRL_CONN_GET_ENTRIES 1024

enum {
    GET_IPVS_CONN_FLAG_ALL = 1,
    GET_IPVS_CONN_FLAG_MORE = 2,
    GET_IPVS_CONN_FLAG_SPECIFIED = 4,
    GET_IPVS_CONN_FLAG_TEMPLATE = 8,
};

enum {
    GET_IPVS_CONN_RESL_OK = 1,
    GET_IPVS_CONN_RESL_MORE = 2,
    GET_IPVS_CONN_RESL_FAIL = 4,
    GET_IPVS_CONN_RESL_NOTEXIST = 8,
};

typedef struct ip_vs_sockpair {
    uint16_t af;
    uint16_t proto;
    uint16_t sport;
    uint16_t tport;
    union inet_addr sip;
    union inet_addr tip;
} ipvs_sockpair_t;

typedef struct ip_vs_conn_entry {
    uint16_t in_af;
    uint16_t out_af;
    uint16_t proto;
    union inet_addr caddr;
    union inet_addr vaddr;
    union inet_addr laddr;
    union inet_addr daddr;
    uint16_t cport;
    uint16_t vport;
    uint16_t lport;
    uint16_t dport;
    uint32_t timeout;
    uint8_t lcoreid;
    char state[16];
} ipvs_conn_entry_t;

struct ip_vs_conn_req {
    uint32_t flag;
    uint32_t whence;
    ipvs_sockpair_t sockpair;
};

struct ip_vs_conn_array {
    uint32_t nconns;
    uint32_t resl;
    uint8_t curcid;
    ipvs_conn_entry_t array[0];
} __attribute__((__packed__));

#endif
