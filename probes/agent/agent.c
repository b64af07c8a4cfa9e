/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The agent: code that runs inside the DPVS process and puts other nodes' sessions into it.
 *
 * Rules
 * - It knows DPVS by exported symbols and by the offsets in agent_config, nothing else. It uses no DPDK or DPVS header.
 * - It is loaded once and never unmapped: the reserved SET_CONN slot, once filled, never goes back to NULL (DPVS calls it
 *   without a check: 1.10.2, src/ctrl.c: sockopt_ctl).
 * - Registration happens on the master lcore, in a one-shot global timer of DPVS: the only thread that walks the list of
 *   socket option handlers. Sessions are touched only on the worker that owns them, in an inter-lcore message, at most one
 *   outstanding per worker, at most chunk_limit_ns long.
 * - A copy waits as SYNACK|INACTIVE: DPVS lets such a session end in silence, where an ESTABLISHED one would send resets to
 *   client and server (1.10.2, src/ipvs/ip_vs_proto_tcp.c: tcp_send_rst), and the first ACK of either side makes it
 *   ESTABLISHED. A copy in any other state carries traffic: it is not ours to touch any more.
 * - A newer agent takes over from an older one by replacing the three pointers that the older one's entries jump through, on
 *   the master lcore and while the older one has nothing under way. The older one's code stays, and is never run again.
 * - Whatever does not fit what we expect poisons the agent: it refuses everything from then on, and the door says why.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

#define NSEC 1000000000ull
#define MAX_HANDLERS 256 /* socket option handlers; DPVS has about twenty */

struct agent_config agent_config = {
	.magic = AGENT_CONFIG_MAGIC,
	.abi = AGENT_ABI,
};
struct agent_door agent_door = {
	.magic = AGENT_DOOR_MAGIC,
	.abi = AGENT_ABI,
	.build = AGENT_BUILD,
	.state = AGENT_LOADING,
};
struct agent_dpvs dpvs;

static const struct {
	const char *name;
	void **where;
} symbols[] = {
#define SYMBOL(f) { #f, (void **)&dpvs.f }
	SYMBOL(dpvs_state_get),		SYMBOL(dpvs_timer_sched),	 SYMBOL(dpvs_timer_sched_period),
	SYMBOL(sockopt_register),	SYMBOL(sockopt_unregister),	 SYMBOL(msg_type_register),
	SYMBOL(msg_type_unregister),	SYMBOL(msg_make),		 SYMBOL(msg_send),
	SYMBOL(msg_destroy),		SYMBOL(netif_get_slave_lcores),	 SYMBOL(rte_get_main_lcore),
	SYMBOL(dp_vs_conn_get),		SYMBOL(dp_vs_ct_in_get),	 SYMBOL(dp_vs_conn_new),
	SYMBOL(dp_vs_conn_put),		SYMBOL(dp_vs_conn_put_no_reset), SYMBOL(dp_vs_service_lookup),	 SYMBOL(dp_vs_dest_lookup),
	SYMBOL(inet_addr_ifa_get),	SYMBOL(inet_addr_ifa_put),
#undef SYMBOL
};

static struct timer_room start_timer;
static int start_claimed; /* 1: the timer has it; 2: the waiting thread gave up first */

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * NSEC + (uint64_t)t.tv_nsec;
}

void set_state(uint32_t state, const char *format, ...)
{
	static int once;
	va_list args;

	if (format && __sync_bool_compare_and_swap(&once, 0, 1)) { /* the first reason is the one to keep */
		va_start(args, format);
		vsnprintf(door.error, sizeof(door.error), format, args);
		va_end(args);
	}
	__atomic_store_n(&door.state, state, __ATOMIC_RELEASE);
}

/* What DPVS calls. They only jump, so that a newer agent can take over. */
static int entry_set(uint32_t opt, const void *in, size_t in_bytes)
{
	return ((int (*)(uint32_t, const void *, size_t))(uintptr_t)__atomic_load_n(&door.set_handler, __ATOMIC_ACQUIRE))(
		opt, in, in_bytes);
}
static int entry_work(void *msg)
{
	return ((int (*)(void *))(uintptr_t)__atomic_load_n(&door.work_handler, __ATOMIC_ACQUIRE))(msg);
}
static int entry_done(void *msg)
{
	return ((int (*)(void *))(uintptr_t)__atomic_load_n(&door.done_handler, __ATOMIC_ACQUIRE))(msg);
}

/* ---- getting in ---- */

/* The registered handler that covers SOCKOPT_SET_CONN, in exactly the shape that a stock DPVS gives it, but for its SET
 * function: that is `expected`. */
static void *find_conn_sockopts(uint64_t expected, char *why, size_t why_bytes)
{
	static uint64_t dummy[16]; /* a handler of ranges nobody uses: registered at the tail, its next is the list's head */
	struct list_head *head, *node;
	void *candidate, *found = NULL;
	unsigned i, matches = 0;

	put32(AT(dummy, dpvs_sockopts, version), config.sockopt_version);
	put32(AT(dummy, dpvs_sockopts, set_opt_min), 0x7fffff00);
	put32(AT(dummy, dpvs_sockopts, set_opt_max), 0x7fffff00);
	put32(AT(dummy, dpvs_sockopts, get_opt_min), 0x7fffff00);
	put32(AT(dummy, dpvs_sockopts, get_opt_max), 0x7fffff00);
	if (dpvs.sockopt_register(dummy) != EDPVS_OK) {
		snprintf(why, why_bytes, "sockopt_register refused");
		return NULL;
	}
	head = ((struct list_head *)AT(dummy, dpvs_sockopts, list))->next;
	for (node = head->next, i = 0; node != head && i < MAX_HANDLERS; node = node->next, i++) {
		candidate = (char *)node - config.offsets[OFF_dpvs_sockopts_list];
		if (candidate == (void *)dummy)
			continue;
		if (get32(AT(candidate, dpvs_sockopts, set_opt_min)) > config.sockopt_set_conn ||
		    get32(AT(candidate, dpvs_sockopts, set_opt_max)) < config.sockopt_set_conn)
			continue;
		matches++;
		found = candidate;
	}
	dpvs.sockopt_unregister(dummy);
	if (i >= MAX_HANDLERS || matches != 1) {
		snprintf(why, why_bytes, "%u handlers cover SET_CONN among %u: expected 1", matches, i);
		return NULL;
	}
	if (get32(AT(found, dpvs_sockopts, version)) != config.sockopt_version ||
	    get32(AT(found, dpvs_sockopts, set_opt_min)) != config.sockopt_set_conn ||
	    get32(AT(found, dpvs_sockopts, set_opt_max)) != config.sockopt_set_conn ||
	    get32(AT(found, dpvs_sockopts, get_opt_min)) != config.sockopt_get_conn_min ||
	    get32(AT(found, dpvs_sockopts, get_opt_max)) != config.sockopt_get_conn_max ||
	    !getp(AT(found, dpvs_sockopts, get))) {
		snprintf(why, why_bytes, "the handler of SET_CONN does not have the ids this release should have");
		return NULL;
	}
	if ((uint64_t)(uintptr_t)getp(AT(found, dpvs_sockopts, set)) != expected) {
		snprintf(why, why_bytes, "the reserved SET_CONN slot is already filled by somebody else");
		return NULL;
	}
	return found;
}

static bool register_type(uint32_t type, unsigned lcore, int (*callback)(void *), bool add)
{
	uint64_t mt[16] = { 0 };

	put32(AT(mt, dpvs_msg_type, type), type);
	put8(AT(mt, dpvs_msg_type, prio), MSG_PRIO_HIGH);
	put8(AT(mt, dpvs_msg_type, cid), (uint8_t)lcore);
	put32(AT(mt, dpvs_msg_type, mode), MSG_UNICAST);
	putp(AT(mt, dpvs_msg_type, unicast_msg_cb), (void *)(uintptr_t)callback);
	return (add ? dpvs.msg_type_register(mt) : dpvs.msg_type_unregister(mt)) == EDPVS_OK;
}

static bool register_types(unsigned main_lcore, unsigned n_workers, const unsigned *lcores)
{
	unsigned i;

	if (!register_type(config.msg_type_done, main_lcore, entry_done, true))
		return false;
	for (i = 0; i < n_workers; i++)
		if (!register_type(config.msg_type_work, lcores[i], entry_work, true))
			break;
	if (i == n_workers)
		return true;
	while (i--)
		register_type(config.msg_type_work, lcores[i], entry_work, false);
	register_type(config.msg_type_done, main_lcore, entry_done, false);
	return false;
}

/* The agent to take over from; NULL and a reason when what is at its address is not what the loader saw there. */
static struct agent_door *old_agent(void)
{
	struct agent_door *old = (struct agent_door *)(uintptr_t)config.old_door;
	uint32_t state = __atomic_load_n(&old->state, __ATOMIC_ACQUIRE);

	if (memcmp(old->magic, AGENT_DOOR_MAGIC, sizeof(old->magic)) != 0 || old->token != config.old_token)
		set_state(AGENT_FAILED, "the agent to take over from is not where it was");
	else if (old->build > AGENT_BUILD)
		set_state(AGENT_FAILED, "build %u does not take over from build %u", AGENT_BUILD, old->build);
	else if (state != AGENT_READY && state != AGENT_RETIRED)
		set_state(AGENT_FAILED, "the agent to take over from is in state %u", state);
	else
		return old;
	return NULL;
}

/* What an older agent left, read and written on the master lcore with nothing of its under way. */
static void take_over(struct agent_door *old)
{
	/* the first agent of all has no `trampolines` of its own: they are in its door */
	uint64_t *trampolines = old->trampolines ? (uint64_t *)(uintptr_t)old->trampolines : &old->set_handler;

	__atomic_store_n(&trampolines[2], door.done_handler, __ATOMIC_RELEASE);
	__atomic_store_n(&trampolines[1], door.work_handler, __ATOMIC_RELEASE);
	__atomic_store_n(&trampolines[0], door.set_handler, __ATOMIC_RELEASE);
	door.trampolines = (uint64_t)(uintptr_t)trampolines;
	door.entry = old->entry;
	door.slot = old->slot;
	__atomic_store_n(&old->state, AGENT_REPLACED, __ATOMIC_RELEASE);
}

static int on_master(void *arg)
{
	uint32_t state = config.start_retired ? AGENT_RETIRED : AGENT_READY;
	struct agent_door *old = NULL;
	char why[128] = "";
	void *sockopts;
	uint64_t mask = 0;
	uint8_t count = 0;
	unsigned i, n_workers = 0, main_lcore, lcores[AGENT_MAX_WORKERS];

	(void)arg;
	if (__atomic_load_n(&start_claimed, __ATOMIC_ACQUIRE) == 0 && config.old_door) {
		old = old_agent();
		if (old && __atomic_load_n(&old->outstanding, __ATOMIC_ACQUIRE)) {
			/* it takes nothing new from now on, and ends what it has: again in a moment */
			__atomic_store_n(&old->state, AGENT_RETIRED, __ATOMIC_RELEASE);
			return DTIMER_OK;
		}
	}
	if (!__sync_bool_compare_and_swap(&start_claimed, 0, 1))
		return DTIMER_STOP; /* too late: the loader has already been told that it failed */
	if (config.old_door && !old)
		return DTIMER_STOP;
	main_lcore = dpvs.rte_get_main_lcore();
	if (per_lcore__lcore_id != main_lcore) {
		set_state(AGENT_FAILED, "the global timer ran on lcore %u, the master is %u", per_lcore__lcore_id, main_lcore);
		return DTIMER_STOP;
	}
	dpvs.netif_get_slave_lcores(&count, &mask);
	for (i = 0; i < AGENT_MAX_WORKERS; i++)
		if (mask & (1ull << i))
			lcores[n_workers++] = i;
	if (!n_workers || n_workers != count) {
		set_state(AGENT_FAILED, "DPVS says %u workers, their mask has %u", count, n_workers);
		return DTIMER_STOP;
	}
	if (old && old->worker_mask != mask) {
		set_state(AGENT_FAILED, "the agent to take over from knows other workers");
		return DTIMER_STOP;
	}
	sockopts = find_conn_sockopts(old ? old->entry : 0, why, sizeof(why));
	if (!sockopts) {
		set_state(AGENT_FAILED, "%s", why);
		return DTIMER_STOP;
	}
	batch_init(main_lcore, mask);
	door.set_handler = (uint64_t)(uintptr_t)batch_set;
	door.work_handler = (uint64_t)(uintptr_t)batch_work;
	door.done_handler = (uint64_t)(uintptr_t)batch_done;
	if (!old && !register_types(main_lcore, n_workers, lcores)) {
		set_state(AGENT_FAILED, "could not register a message type");
		return DTIMER_STOP;
	}
	door.pid = (uint32_t)getpid();
	door.n_workers = n_workers;
	door.worker_mask = mask;
	door.loaded_ns = now_ns();
	if (old) {
		take_over(old);
		set_state(state, NULL);
		return DTIMER_STOP;
	}
	door.trampolines = (uint64_t)(uintptr_t)&door.set_handler;
	door.entry = (uint64_t)(uintptr_t)entry_set;
	door.slot = (uint64_t)(uintptr_t)AT(sockopts, dpvs_sockopts, set);
	set_state(state, NULL);
	__atomic_store_n((void **)AT(sockopts, dpvs_sockopts, set), (void *)(uintptr_t)entry_set, __ATOMIC_RELEASE); /* last */
	return DTIMER_STOP;
}

static void *arrive(void *arg)
{
	struct timeval soon = { 0, 1000 };
	struct timespec nap = { 0, 1000000 };
	uint64_t deadline = now_ns() + config.time_limit_ms * 1000000ull;
	cpu_set_t all;
	int armed;

	(void)arg;
	/* DPDK's control thread may be bound to a core that a worker polls: run anywhere */
	memset(&all, 0xff, sizeof(all));
	sched_setaffinity(0, sizeof(all), &all);
	while (dpvs.dpvs_state_get() != STATE_NORMAL) {
		if (config.start_retired) { /* loaded before DPVS began: it comes up when it does */
			nap.tv_nsec = 20000000;
			deadline = now_ns() + config.time_limit_ms * 1000000ull;
		} else if (now_ns() > deadline) {
			set_state(AGENT_FAILED, "DPVS did not come up within %u ms", config.time_limit_ms);
			return NULL;
		}
		nanosleep(&nap, NULL);
	}
	armed = config.old_door ? dpvs.dpvs_timer_sched_period(&start_timer, &soon, on_master, NULL, true)
				: dpvs.dpvs_timer_sched(&start_timer, &soon, on_master, NULL, true);
	if (armed != EDPVS_OK) {
		set_state(AGENT_FAILED, "DPVS refused a timer");
		return NULL;
	}
	while (__atomic_load_n(&start_claimed, __ATOMIC_ACQUIRE) == 0) {
		if (now_ns() > deadline && __sync_bool_compare_and_swap(&start_claimed, 0, 2)) {
			set_state(AGENT_FAILED, "the master lcore did not %s within %u ms",
				  config.old_door ? "end what the older agent had under way" : "run its timers",
				  config.time_limit_ms);
			return NULL;
		}
		nanosleep(&nap, NULL);
	}
	return NULL;
}

/* Fields without which some records are refused (session.c: check_record; template.c: check_template). */
static bool is_optional(unsigned offset)
{
	return offset == OFF_dp_vs_conn_syn_proxy_seq || offset == OFF_dp_vs_conn_wscale_vs ||
	       offset == OFF_dp_vs_conn_wscale_rs || offset == OFF_dp_vs_conn_pp_version ||
	       offset == OFF_dp_vs_conn_pp_sent || offset == OFF_dp_vs_service_flags ||
	       offset == OFF_dp_vs_service_timeout || offset == OFF_dp_vs_service_netmask;
}

__attribute__((constructor)) static void load(void)
{
	pthread_t thread;
	pthread_attr_t attr;
	unsigned i;

	if (!config.filled) {
		set_state(AGENT_FAILED, "not configured: only dpvs-probe attach may load this");
		return;
	}
	door.token = config.token;
	for (i = 0; i < N_OFFSETS; i++)
		if (config.offsets[i] == 0xffff && !is_optional(i)) {
			set_state(AGENT_FAILED, "offset %u is missing in the layout", i);
			return;
		}
	if (!config.worker_share || config.worker_share > 99 || !config.watchdog_ms) {
		set_state(AGENT_FAILED, "the configuration is not one of ours");
		return;
	}
	if (SIZE_OF(dpvs_sockopts) > 128 || SIZE_OF(dpvs_msg_type) > 128 || SIZE_OF(dp_vs_conn_param) > 64) {
		set_state(AGENT_FAILED, "a struct of the layout is larger than the agent has room for");
		return;
	}
	if (config.offsets[OFF_dp_vs_service_lookup_cid] != LOOKUP_PLAIN &&
	    config.offsets[OFF_dp_vs_service_lookup_cid] != LOOKUP_OUTWALL) {
		set_state(AGENT_FAILED, "dp_vs_service_lookup takes other arguments than in any release");
		return;
	}
	door.digest = config.digest;
	door.worker_share = config.worker_share;
	door.results = (uint64_t)(uintptr_t)&agent_results;
	memcpy(door.version, config.version, sizeof(door.version));
	for (i = 0; i < sizeof(symbols) / sizeof(symbols[0]); i++) {
		*symbols[i].where = dlsym(RTLD_DEFAULT, symbols[i].name);
		if (!*symbols[i].where) {
			set_state(AGENT_FAILED, "DPVS does not export %s", symbols[i].name);
			return;
		}
	}
	if (!dlsym(RTLD_DEFAULT, "per_lcore__lcore_id")) {
		set_state(AGENT_FAILED, "DPVS does not export per_lcore__lcore_id");
		return;
	}
	*(void **)&dpvs.dp_vs_conn_hashkey = dlsym(RTLD_DEFAULT, "dp_vs_conn_hashkey");
	pthread_attr_init(&attr);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	if (pthread_create(&thread, &attr, arrive, NULL) != 0)
		set_state(AGENT_FAILED, "could not start a thread");
	pthread_attr_destroy(&attr);
}
