/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the agent inside DPVS and the Python outside share. One place declares it: agent.c compiles these structs,
 * probes/agent/abi.py reads the FIELDS list from this very file and mirrors the structs, and a test compares the two.
 *
 * Rules: little-endian, natural alignment, no implicit padding, every size asserted. Nothing here is a DPVS struct: those
 * reach the agent as offsets (struct agent_config.offsets), out of the layout data that was proven on the live process.
 */
#ifndef DPVS_PROBE_AGENT_ABI_H
#define DPVS_PROBE_AGENT_ABI_H

#include <stdint.h>

#define AGENT_ABI 2
/* Goes up with each change of the agent's code: a higher one takes over from a lower one, never the other way round. */
#ifndef AGENT_BUILD
#define AGENT_BUILD 6
#endif
#define AGENT_MAX_RECORDS 4096 /* records a request: 590 KiB, read and split by the master in well under a millisecond */
#define AGENT_MAX_REQUESTS 8   /* requests outstanding */
#define AGENT_RESULTS 64       /* results kept, the oldest is overwritten first */
#define AGENT_MAX_WORKERS 64
#define AGENT_LATE_NS 100000 /* longer than that no callback on a worker may take */
#define AGENT_OFFSETS 128

#define AGENT_CONFIG_MAGIC "DPVSPROBE-CONFIG"
#define AGENT_DOOR_MAGIC "DPVSPROBE-DOOR-1"
#define AGENT_REQUEST_MAGIC 0x3142525053565044ull /* "DPVSPRB1" */

/* Every field of a DPVS struct that the agent reads or writes: FIELD(struct, field), and SIZE(struct) for whole structs.
 * dp_vs_service_lookup is a function: its arguments from the seventh on, by their place above the stack pointer at entry.
 * The order is the index into agent_config.offsets. */
#define AGENT_FIELDS(FIELD, SIZE) \
	SIZE(dp_vs_conn) \
	FIELD(dp_vs_conn, proto) \
	FIELD(dp_vs_conn, caddr) \
	FIELD(dp_vs_conn, vaddr) \
	FIELD(dp_vs_conn, laddr) \
	FIELD(dp_vs_conn, daddr) \
	FIELD(dp_vs_conn, cport) \
	FIELD(dp_vs_conn, vport) \
	FIELD(dp_vs_conn, lport) \
	FIELD(dp_vs_conn, dport) \
	FIELD(dp_vs_conn, tuplehash) \
	FIELD(dp_vs_conn, refcnt) \
	FIELD(dp_vs_conn, timer) \
	FIELD(dp_vs_conn, timeout) \
	FIELD(dp_vs_conn, dest) \
	FIELD(dp_vs_conn, local) \
	FIELD(dp_vs_conn, fnat_seq) \
	FIELD(dp_vs_conn, rs_end_seq) \
	FIELD(dp_vs_conn, rs_end_ack) \
	FIELD(dp_vs_conn, syn_proxy_seq) \
	FIELD(dp_vs_conn, wscale_vs) \
	FIELD(dp_vs_conn, wscale_rs) \
	FIELD(dp_vs_conn, pp_version) \
	FIELD(dp_vs_conn, pp_sent) \
	FIELD(dp_vs_conn, flags) \
	FIELD(dp_vs_conn, state) \
	FIELD(dp_vs_conn, old_state) \
	FIELD(dp_vs_conn, control) \
	FIELD(dp_vs_conn, n_control) \
	FIELD(dp_vs_conn, in_smac) \
	FIELD(dp_vs_conn, in_dmac) \
	FIELD(dp_vs_conn, out_smac) \
	FIELD(dp_vs_conn, out_dmac) \
	FIELD(dp_vs_conn, in_nexthop) \
	FIELD(dp_vs_conn, out_nexthop) \
	SIZE(conn_tuple_hash) \
	FIELD(dpvs_timer, handler) \
	FIELD(dp_vs_dest, n_list) \
	FIELD(dp_vs_dest, af) \
	FIELD(dp_vs_dest, addr) \
	FIELD(dp_vs_dest, port) \
	FIELD(dp_vs_dest, fwdmode) \
	FIELD(dp_vs_dest, actconns) \
	FIELD(dp_vs_dest, inactconns) \
	FIELD(dp_vs_dest, max_conn) \
	FIELD(dp_vs_dest, svc) \
	FIELD(dp_vs_service, af) \
	FIELD(dp_vs_service, proto) \
	FIELD(dp_vs_service, flags) \
	FIELD(dp_vs_service, timeout) \
	FIELD(dp_vs_service, netmask) \
	FIELD(dp_vs_service, dests) \
	FIELD(dp_vs_service, num_dests) \
	FIELD(dp_vs_service, laddr_list) \
	FIELD(dp_vs_service, laddr_curr) \
	FIELD(dp_vs_service, num_laddrs) \
	FIELD(dp_vs_laddr, af) \
	FIELD(dp_vs_laddr, list) \
	FIELD(dp_vs_laddr, addr) \
	FIELD(dp_vs_laddr, iface) \
	FIELD(inet_ifaddr, af) \
	FIELD(inet_ifaddr, addr) \
	FIELD(inet_ifaddr, sa_pool) \
	FIELD(sa_pool, ifa) \
	FIELD(sa_pool, low) \
	FIELD(sa_pool, high) \
	FIELD(sa_pool, pool_hash) \
	FIELD(sa_pool, pool_hash_sz) \
	SIZE(sa_entry) \
	FIELD(sa_entry, list) \
	FIELD(sa_entry, flags) \
	FIELD(sa_entry, addr) \
	FIELD(sa_entry, port) \
	SIZE(sa_entry_pool) \
	FIELD(sa_entry_pool, sa_entries) \
	FIELD(sa_entry_pool, free_enties) \
	FIELD(sa_entry_pool, shift) \
	SIZE(dp_vs_conn_param) \
	FIELD(dp_vs_conn_param, af) \
	FIELD(dp_vs_conn_param, proto) \
	FIELD(dp_vs_conn_param, caddr) \
	FIELD(dp_vs_conn_param, vaddr) \
	FIELD(dp_vs_conn_param, cport) \
	FIELD(dp_vs_conn_param, vport) \
	FIELD(dp_vs_conn_param, ct_dport) \
	FIELD(dp_vs_service_lookup, cid) \
	SIZE(dpvs_sockopts) \
	FIELD(dpvs_sockopts, version) \
	FIELD(dpvs_sockopts, list) \
	FIELD(dpvs_sockopts, set_opt_min) \
	FIELD(dpvs_sockopts, set_opt_max) \
	FIELD(dpvs_sockopts, set) \
	FIELD(dpvs_sockopts, get_opt_min) \
	FIELD(dpvs_sockopts, get_opt_max) \
	FIELD(dpvs_sockopts, get) \
	FIELD(dpvs_msg, data) \
	SIZE(dpvs_msg_type) \
	FIELD(dpvs_msg_type, type) \
	FIELD(dpvs_msg_type, prio) \
	FIELD(dpvs_msg_type, cid) \
	FIELD(dpvs_msg_type, mode) \
	FIELD(dpvs_msg_type, unicast_msg_cb)

/* Filled in by the loader in a private copy of the shared object, before that copy goes into the process. */
struct agent_config {
	char magic[16];
	uint32_t abi;
	uint32_t filled; /* 1 once the loader has been here */
	uint64_t token;  /* names this load; every request must carry it */
	char version[32];
	uint32_t time_limit_ms; /* for reaching the master lcore */
	uint32_t sockopt_version;
	uint32_t sockopt_set_conn;
	uint32_t sockopt_get_conn_min;
	uint32_t sockopt_get_conn_max;
	uint32_t msg_type_work; /* master to worker */
	uint32_t msg_type_done; /* worker to master */
	uint32_t chunk_limit_ns; /* when one callback on a worker ends, whatever is left of its chunk */
	uint32_t worker_share;	 /* percent of a worker's time that we take at most, while it is not that busy */
	uint32_t watchdog_ms;	 /* a worker that takes longer over one chunk is not to be trusted any more */
	uint32_t start_retired;	 /* 1: begin as a stub, to be woken later */
	uint32_t udp_waits;	 /* 1: no UDP session of DPVS's own is in state 0, so that a copy can wait there */
	uint64_t digest;   /* of the offsets and ids in here: which layout this agent goes by */
	uint64_t old_door; /* the door of the agent to take over from; 0: there is none */
	uint64_t old_token;
	uint16_t offsets[AGENT_OFFSETS]; /* by AGENT_FIELDS; 0xffff = not given */
};
_Static_assert(sizeof(struct agent_config) == 16 + 8 + 8 + 32 + 32 + 40 + 2 * AGENT_OFFSETS, "agent_config");

enum agent_state {
	AGENT_LOADING = 0,
	AGENT_READY = 1,
	AGENT_RETIRED = 2,  /* the stub: answers, refuses everything but HELLO and REVIVE */
	AGENT_POISONED = 3, /* an invariant failed: refuses everything for good, says why */
	AGENT_FAILED = 4,   /* never came up; nothing in DPVS was changed */
	AGENT_REPLACED = 5, /* a newer agent answers in its place, through its trampolines */
};

/* TRIAL is a BATCH that makes or updates one session at most, and says where it is (agent_result.conn). */
enum agent_op { AGENT_HELLO = 1, AGENT_BATCH = 2, AGENT_RETIRE = 3, AGENT_REVIVE = 4, AGENT_TRIAL = 5 };
/* CHECK looks at the copies of a session and puts nothing in: where one of several carries traffic, the others go. */
enum agent_record_op { AGENT_UPSERT = 1, AGENT_DELETE = 2, AGENT_CHECK = 3, AGENT_YIELD = 4, AGENT_CLAIM = 5 };

/* What became of one record. Below 16: done or rightly left alone; 16 to 31: may work later; from 32: never will. */
enum agent_code {
	CODE_PENDING = 0,
	CODE_CREATED = 1,
	CODE_UPDATED = 2,
	CODE_DELETED = 3,
	CODE_ABSENT = 4,
	CODE_LIVE = 5,
	CODE_FOREIGN = 6,
	CODE_WAITING = 7,
	CODE_YIELDED = 8,
	CODE_NO_SERVICE = 16,
	CODE_NO_DEST = 17,
	CODE_NO_LADDR = 18,
	CODE_PORT_BUSY = 19,
	CODE_NO_MEMORY = 20,
	CODE_BUSY = 21,
	CODE_OVERLOAD = 22,
	CODE_BAD_RECORD = 32,
	CODE_UNSUPPORTED = 33,
	CODE_WRONG_WORKER = 34,
	CODE_MODE_MISMATCH = 35,
	CODE_RETIRED = 36,
	CODE_MAX = 64,
};

struct agent_worker_stats {
	uint64_t chunks;
	uint64_t records;
	uint64_t busy_ns; /* time spent in our callbacks on this worker */
	uint64_t max_ns;  /* the longest of them */
	uint64_t late;	  /* those over AGENT_LATE_NS */
};
_Static_assert(sizeof(struct agent_worker_stats) == 40, "agent_worker_stats");

struct agent_result {
	uint64_t request_id;
	uint32_t count;
	uint32_t done; /* == count: all codes are final */
	uint64_t begin_ns;
	uint64_t end_ns;
	uint64_t conn; /* TRIAL: address of the session that was made or updated; 0: none was */
	uint64_t reserved;
};
_Static_assert(sizeof(struct agent_result) == 48, "agent_result");

/* Apart from the door, which the outside reads often: this it reads in parts. */
struct agent_results {
	struct agent_result heads[AGENT_RESULTS];
	uint8_t codes[AGENT_RESULTS][AGENT_MAX_RECORDS];
};

/* What the world outside may read of the agent, straight from the process's memory: proof that it is there before a
 * single byte is sent to SOCKOPT_SET_CONN, and where the results of what was sent are. All up to `digest` stays where it is
 * in every release: that is what a newer agent goes by that takes over. */
struct agent_door {
	char magic[16];
	uint32_t abi;
	uint32_t state; /* enum agent_state */
	uint64_t token;
	uint64_t entry; /* the function that fills the reserved slot */
	uint64_t slot;  /* address of that slot: must hold `entry` */
	uint32_t pid;   /* as the process itself sees it */
	uint32_t n_workers;
	uint64_t worker_mask;
	uint64_t hello_nonce; /* request id of the last HELLO */
	char version[32];
	char error[128]; /* why FAILED or POISONED */
	/* counters */
	uint64_t requests;
	uint64_t malformed;
	uint64_t wrong_token;
	uint64_t busy;
	uint64_t refused; /* because retired or poisoned */
	uint64_t outstanding;
	uint64_t loaded_ns;
	/* `entry` and the message callbacks only jump through these three: a newer agent takes over by replacing them */
	uint64_t set_handler;
	uint64_t work_handler;
	uint64_t done_handler;
	uint64_t trampolines; /* address of the three that `entry` goes by: our own, or those of the first agent loaded */
	uint32_t build;
	uint32_t worker_share;
	uint64_t digest;
	uint64_t results;  /* address of struct agent_results */
	uint64_t accepted; /* records ever taken: the sum of by_code, once nothing is outstanding */
	uint64_t reserved[4];
	uint64_t by_code[CODE_MAX];
	struct agent_worker_stats workers[AGENT_MAX_WORKERS];
};
_Static_assert(sizeof(struct agent_door) == 256 + 128 + 8 * CODE_MAX + 40 * AGENT_MAX_WORKERS, "agent_door");

/* One request: header, op[count] padded to 8, record[count]. */
struct agent_request {
	uint64_t magic;
	uint32_t abi;
	uint32_t op; /* enum agent_op */
	uint64_t token;
	uint64_t request_id; /* not 0, not one that is still in the results */
	uint32_t count;
	uint32_t record_bytes;
	uint64_t reserved[3];
};
_Static_assert(sizeof(struct agent_request) == 64, "agent_request");

/* One session: collector/record.py RECORD, byte for byte. */
struct agent_seq {
	uint32_t isn, delta, fdata_seq, prev_delta;
};
struct agent_record {
	uint32_t slot, generation;
	uint8_t af, af_out, proto, fwdmode;
	uint16_t state, flags;
	uint8_t caddr[16], vaddr[16], laddr[16], daddr[16];
	uint16_t cport, vport, lport, dport; /* network order */
	uint32_t timeout_ms;
	uint8_t worker, wscale_vs, wscale_rs, pp_version;
	struct agent_seq fnat, sp;
	uint32_t rs_end_seq, rs_end_ack;
	uint8_t pp_sent, reserved[3];
	uint32_t claim; /* between nodes; nothing to the agent */
};
_Static_assert(sizeof(struct agent_record) == 144, "agent_record");

#endif
