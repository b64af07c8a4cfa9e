// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Sessions of DPVS as they are created and freed: one 32-byte event for each, without waking anybody.
 *
 * Given by probes/loader.py: CREATE_CONN, FREE_CONN    the register of struct pt_regs that holds the session at the site
 *                            CONN_FLAGS_OFFSET         of conn->flags, from the layout of this DPVS
 *                            INJECTED_FLAG             sessions that a peer put in: their events would only echo
 *                            RING_PAGES                size of the ring buffer, a power of two
 *                            COUNTER_SLOTS             8 counters for each possible CPU
 * struct event is EVENT of probes/ring.py, the order of the counters is COUNTERS of probes/loader.py.
 */
#include <uapi/linux/ptrace.h>

enum { CREATE = 1, FREE = 2 };
enum { HITS_CREATE, HITS_FREE, INJECTED, LOST, UNREADABLE, COUNTERS_PER_CPU = 8 };

struct event {
	u64 conn;
	u64 time_ns; /* CLOCK_MONOTONIC */
	u32 tid;
	u16 kind;
	u16 flags; /* conn->flags as they are now; 0 if they were not or could not be read */
	u64 reserved;
};

BPF_RINGBUF_OUTPUT(events, RING_PAGES);
/* Mappable, so that user space reads the counters without a system call; a cache line for each CPU. */
BPF_F_TABLE("array", u32, u64, counters, COUNTER_SLOTS, BPF_F_MMAPABLE);

/* Not 0: there are sessions that a peer put in, so look at each one's flags, two fifths of what this program costs. */
BPF_F_TABLE("array", u32, u64, copies, 1, BPF_F_MMAPABLE);

static inline u64 *counter_of(u32 which)
{
	u32 key = bpf_get_smp_processor_id() * COUNTERS_PER_CPU + which;

	return counters.lookup(&key);
}

static inline void count(u32 which)
{
	u64 *counter = counter_of(which);

	if (counter)
		__sync_fetch_and_add(counter, 1);
}

/*
 * The same without a locked instruction, for what is counted at each hit. Where the kernel may take the processor from us
 * between the two halves of it, and another thread on this CPU hits meanwhile, one hit goes uncounted: DPVS's workers
 * have a CPU each, and a share of time is made of it, nothing else.
 */
static inline void count_quickly(u32 which)
{
	u64 *counter = counter_of(which);

	if (counter)
		*counter += 1;
}

static inline int seen(u64 conn, u16 kind, u32 hits)
{
	u32 first = 0;
	u64 *looking = copies.lookup(&first);
	struct event *event;
	u16 flags = 0;

	count_quickly(hits);
	if (looking && *looking) {
		if (bpf_probe_read_user(&flags, sizeof(flags), (void *)(conn + CONN_FLAGS_OFFSET)))
			count(UNREADABLE);
		if (flags & INJECTED_FLAG) {
			count(INJECTED);
			return 0;
		}
	}
	event = events.ringbuf_reserve(sizeof(*event));
	if (!event) {
		count(LOST);
		return 0;
	}
	event->conn = conn;
	event->time_ns = bpf_ktime_get_ns();
	event->tid = (u32)bpf_get_current_pid_tgid();
	event->kind = kind;
	event->flags = flags;
	event->reserved = 0;
	events.ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	return 0;
}

/* A perf event for each site... */
int session_create(struct pt_regs *ctx)
{
	return seen(ctx->CREATE_CONN, CREATE, HITS_CREATE);
}

int session_free(struct pt_regs *ctx)
{
	return seen(ctx->FREE_CONN, FREE, HITS_FREE);
}

/* ...or one link for both (Linux 6.6), whose cookie says which. */
int session_either(struct pt_regs *ctx)
{
	if (bpf_get_attach_cookie(ctx) == CREATE)
		return seen(ctx->CREATE_CONN, CREATE, HITS_CREATE);
	return seen(ctx->FREE_CONN, FREE, HITS_FREE);
}
