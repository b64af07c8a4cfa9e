/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the files of the agent share: how it sees DPVS's structs, what it calls, its own state.
 */
#ifndef DPVS_PROBE_AGENT_INTERNAL_H
#define DPVS_PROBE_AGENT_INTERNAL_H

#include <arpa/inet.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/time.h>

#include "agent_abi.h"

/* DPDK: which lcore this thread is. Weak, so that with LD_PRELOAD programs start that are no DPVS. */
extern __thread unsigned int per_lcore__lcore_id __attribute__((weak));

/* Everything of ours stays ours: DPVS exports all its functions, and an older agent in the process has the same names. */
#pragma GCC visibility push(hidden)

extern struct agent_config agent_config;
extern struct agent_door agent_door;
extern struct agent_results agent_results;
#define door agent_door
#define config agent_config

/* DPVS's own numbers: 1.10.2, include/conf/common.h, include/ipvs/proto_tcp.h, include/conf/conn.h, include/ctrl.h. The
 * error codes are the ones its table of messages knows. */
enum { EDPVS_OK = 0, EDPVS_INVAL = -1, EDPVS_EXIST = -3, EDPVS_BUSY = -13, EDPVS_DISABLED = -18 };
enum { TCP_NONE = 0, TCP_ESTABLISHED = 1, TCP_SYN_SENT = 2, TCP_CLOSE = 6, TCP_SYNACK = 10, UDP_NONE = 0, UDP_NORMAL = 2 };
enum { SCTP_ESTABLISHED = 8, SCTP_CLOSED = 13 };
enum { F_SYNPROXY = 0x10, F_QUIESCENT = 0x20, F_INACTIVE = 0x200, F_TEMPLATE = 0x400, F_ONE_PACKET = 0x800 };
enum { F_INJECTED = 0x8000, SVC_PERSISTENT = 1 };
enum { FWD_NAT = 0, FWD_TUNNEL = 2, FWD_DR = 3, FWD_FNAT = 5 };
enum { SA_F_USED = 1, MSG_F_ASYNC = 1, MSG_UNICAST = 1, MSG_PRIO_HIGH = 1, STATE_NORMAL = 3 };
enum { DTIMER_OK = 0, DTIMER_STOP = 1, MAC = 6 };
#define AGENT_MAX_TIMEOUT_S (7 * 86400u)


/* ---- offsets ---- */

#define AS_FIELD(s, f) OFF_##s##_##f,
#define AS_SIZE(s) SIZEOF_##s,
enum { AGENT_FIELDS(AS_FIELD, AS_SIZE) N_OFFSETS };
_Static_assert(N_OFFSETS <= AGENT_OFFSETS, "room for all offsets");

#define AT(base, s, f) ((void *)((char *)(base) + config.offsets[OFF_##s##_##f]))
#define HAS(s, f) (config.offsets[OFF_##s##_##f] != 0xffff)
#define SIZE_OF(s) (config.offsets[SIZEOF_##s])

static inline uint8_t get8(const void *p) { return *(const volatile uint8_t *)p; }
static inline uint16_t get16(const void *p) { return *(const volatile uint16_t *)p; }
static inline uint32_t get32(const void *p) { return *(const volatile uint32_t *)p; }
static inline void *getp(const void *p) { return *(void *const volatile *)p; }
static inline void put8(void *p, uint8_t v) { *(volatile uint8_t *)p = v; }
static inline void put16(void *p, uint16_t v) { *(volatile uint16_t *)p = v; }
static inline void put32(void *p, uint32_t v) { *(volatile uint32_t *)p = v; }
static inline void putp(void *p, void *v) { *(void *volatile *)p = v; }

struct list_head {
	struct list_head *next, *prev;
};
/* struct dpvs_timer (48 bytes in every release; 80 with CONFIG_TIMER_DEBUG), with room to spare. */
struct timer_room {
	uint64_t words[32];
};

/* ---- what we call in DPVS ---- */

struct agent_dpvs {
	int (*dpvs_state_get)(void);
	int (*dpvs_timer_sched)(void *timer, struct timeval *delay, int (*)(void *), void *arg, bool global);
	int (*dpvs_timer_sched_period)(void *timer, struct timeval *delay, int (*)(void *), void *arg, bool global);
	int (*sockopt_register)(void *);
	int (*sockopt_unregister)(void *);
	int (*msg_type_register)(const void *);
	int (*msg_type_unregister)(const void *);
	void *(*msg_make)(uint32_t type, uint32_t seq, int mode, uint8_t cid, uint32_t len, const void *data);
	int (*msg_send)(void *msg, uint8_t cid, uint32_t flags, void **reply);
	int (*msg_destroy)(void **msg);
	void (*netif_get_slave_lcores)(uint8_t *n, uint64_t *mask);
	unsigned (*rte_get_main_lcore)(void);
	void *(*dp_vs_conn_get)(int af, uint16_t proto, const void *saddr, const void *daddr, uint16_t sport,
				uint16_t dport, int *dir, bool reverse);
	void *(*dp_vs_ct_in_get)(int af, uint16_t proto, const void *saddr, const void *daddr, uint16_t sport,
				 uint16_t dport);
	/* may be missing: nothing is asked for ahead then */
	uint32_t (*dp_vs_conn_hashkey)(int af, const void *saddr, uint16_t sport, const void *daddr, uint16_t dport,
				       uint32_t mask);
	void *(*dp_vs_conn_new)(void *mbuf, const void *iph, void *param, void *dest, uint32_t flags);
	void (*dp_vs_conn_put)(void *conn);
	void (*dp_vs_conn_put_no_reset)(void *conn);
	void *dp_vs_service_lookup; /* see find_service */
	void *(*dp_vs_dest_lookup)(int af, void *svc, const void *daddr, uint16_t dport);
	void *(*inet_addr_ifa_get)(int af, const void *dev, void *addr);
	void (*inet_addr_ifa_put)(void *ifa);
};
extern struct agent_dpvs dpvs;

/* ---- state (agent.c) ---- */

uint64_t now_ns(void);
/* The first reason given is the one that the door keeps. */
void set_state(uint32_t state, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* An invariant failed: refuse everything from now on. The code for the record at hand. */
#define poison(...) (__extension__({ set_state(AGENT_POISONED, __VA_ARGS__); (uint8_t)CODE_RETIRED; }))
static inline bool is_ready(void) { return __atomic_load_n(&door.state, __ATOMIC_ACQUIRE) == AGENT_READY; }

/* ---- one session (session.c): only on the worker that owns it ---- */

/* Live, but nothing came from the client; never the answer to a record. */
enum { CODE_LIVE_UNHEARD = 15 };

static inline bool address_equal(int af, const void *a, const void *b)
{
	/* union inet_addr holds rubbish above an IPv4 address */
	return af == AF_INET ? memcmp(a, b, 4) == 0 : memcmp(a, b, 16) == 0; /* of known length: no call */
}

/* Up to 1.9.4 dp_vs_service_lookup has an argument more, bool *outwall before the lcore: the lcore's place on the stack says
 * which it is (the loader has seen DPVS's own code take it from there). And UDP has two states there, NORMAL, which is 0,
 * and LAST: a copy that waits could not be told from a live one, and the states of later releases lie outside its table of
 * time-outs. So this is asked as well as config.udp_waits, which a layout file may have wrong. */
enum { LOOKUP_PLAIN = 16, LOOKUP_OUTWALL = 24 };
static inline bool is_before_1_9_6(void) { return config.offsets[OFF_dp_vs_service_lookup_cid] == LOOKUP_OUTWALL; }

/* The service of a session. */
static inline void *find_service(const struct agent_record *r, unsigned lcore)
{
	typedef void *(*plain)(int, uint16_t, const void *, uint16_t, uint32_t, const void *, const void *, uint8_t);
	typedef void *(*with_outwall)(int, uint16_t, const void *, uint16_t, uint32_t, const void *, const void *,
				      bool *, uint8_t);
	bool outwall = false;

	if (is_before_1_9_6())
		return ((with_outwall)dpvs.dp_vs_service_lookup)(r->af, r->proto, r->vaddr, r->vport, 0, NULL, NULL,
								 &outwall, (uint8_t)lcore);
	return ((plain)dpvs.dp_vs_service_lookup)(r->af, r->proto, r->vaddr, r->vport, 0, NULL, NULL, (uint8_t)lcore);
}

/* Are all places of a real server taken? Asked before DPVS is, which marks a server that it finds full. */
static inline bool is_full(void *dest)
{
	uint32_t limit = get32(AT(dest, dp_vs_dest, max_conn));

	return limit && get32(AT(dest, dp_vs_dest, actconns)) + get32(AT(dest, dp_vs_dest, inactconns)) >= limit;
}

/* What a worker knows of its table of sessions (ahead.c). */
enum { AHEAD_ROOM = 16 };
struct ahead {
	struct list_head *table;
	unsigned proofs;
	bool unknown;
	uint32_t keys[AHEAD_ROOM][2];
};
/* A session that DPVS has just made. */
void ahead_learn(struct ahead *a, void *conn, const struct agent_record *r);
/* Before the record at position `at` of `order` is worked on; `first` is the callback's first, `end` behind the last. */
void ahead_of(struct ahead *a, const struct agent_record *records, const uint16_t *order, unsigned first, unsigned at,
	      unsigned end);

uint8_t check_record(const struct agent_record *r);
/* Is there a copy on every worker, because nothing in the session says which of them gets its packets? */
static inline bool without_owner(const struct agent_record *r)
{
	return r->fwdmode != FWD_FNAT && !(r->flags & F_TEMPLATE);
}
uint8_t upsert_session(const struct agent_record *r, unsigned lcore, struct ahead *ahead);
uint8_t delete_session(const struct agent_record *r);
uint8_t yield_session(const struct agent_record *r);
uint8_t claim_session(const struct agent_record *r);
uint64_t address_of_session(const struct agent_record *r); /* 0: there is none */
uint8_t look_at_session(const struct agent_record *r);
/* Ends a copy that waits; with `unheard`, also one that is live without a packet of the client. */
uint8_t withdraw_session(const struct agent_record *r, bool unheard);
/* What the codes of several workers come to; `seen` has bit n for code n. */
uint8_t merge_codes(uint64_t seen);

/* ---- what ties clients to real servers (template.c): on any worker ---- */

uint8_t check_template(const struct agent_record *r);
uint8_t work_on_template(const struct agent_record *r, uint8_t op, unsigned lcore);
uint64_t address_of_template(const struct agent_record *r); /* 0: there is none */
/* The template of a session that is about to be made, held; NULL where the service ties nobody, or to another server. */
void *template_for(const struct agent_record *r, void *svc, void *dest);
/* Lets a session (NULL: it could not be made) be controlled by a template, and lets go of that. */
void tie(void *conn, void *template);

/* ---- the hash of port pools (hash.c) ---- */

uint32_t hash_words(const uint32_t *words, unsigned count, uint32_t start);

/* ---- requests (batch.c) ---- */

void batch_init(unsigned main_lcore, uint64_t worker_mask);
int batch_set(uint32_t opt, const void *in, size_t in_bytes); /* master: what SOCKOPT_SET_CONN does */
int batch_work(void *msg);				      /* worker: one chunk of records */
int batch_done(void *msg);				      /* master: a chunk is done */

#pragma GCC visibility pop

#endif
