// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Sessions of DPVS as they are created and freed: one event for each, without waking anybody.
 *
 * A thread that has a ring of its own here is the only one that writes there: no lock, nothing of another thread to wait
 * for, and half of what the kernel's ring buffer takes. User space gives rings away, to DPVS's workers; what any other
 * thread does goes into the kernel's ring buffer. Which sessions a peer put in is not asked: to read a session's flags
 * takes more than the event does, and user space reads the session anyhow.
 *
 * Given by probes/loader.py: CREATE_CONN, FREE_CONN    the register of struct pt_regs that holds the session at the site
 *                            THREADS, RINGS, EVENTS    rows of the table of threads, rings, events in each; powers of two
 *                            SHARED_PAGES              size of the kernel's ring buffer, a power of two
 *                            COUNTER_SLOTS             8 counters for each possible CPU
 * The structs are those of probes/ring.py, the order of the counters is COUNTERS of probes/loader.py.
 */
#include <uapi/linux/ptrace.h>

enum { CREATE = 1, FREE = 2 };
enum { HITS_CREATE, HITS_FREE, LOST, COUNTERS_PER_CPU = 8 };

/* In the kernel's ring buffer, for threads without a ring of their own. */
struct event {
	u64 conn;
	u64 time_ns; /* CLOCK_MONOTONIC */
	u32 tid;
	u32 kind;
};

/* In a thread's own ring. */
struct brief {
	u64 conn_kind; /* conn, and the kind in the two highest bits, which no address of user space has */
	u64 time_ns;
};

struct thread {
	u64 owner; /* thread id, and in the upper half its ring; written by user space, 0: nobody's */
	u64 head; /* events written so far, by the thread */
	u64 unused[6];
	u64 tail; /* events read so far, by user space; on a line of memory of its own */
	u64 padding[7];
};

BPF_RINGBUF_OUTPUT(shared, SHARED_PAGES);
BPF_F_TABLE("array", u32, struct thread, threads, THREADS, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct brief, rings, RINGS * EVENTS, BPF_F_MMAPABLE);
/* Mappable, so that user space reads the counters without a system call; a cache line for each CPU. */
BPF_F_TABLE("array", u32, u64, counters, COUNTER_SLOTS, BPF_F_MMAPABLE);

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

static inline int into_own(struct thread *thread, u64 conn, u64 kind)
{
	u64 head = thread->head;
	u32 key = (u32)(thread->owner >> 32) * EVENTS + (head & (EVENTS - 1));
	struct brief *brief = rings.lookup(&key);

	if (!brief || head - thread->tail >= EVENTS) {
		count(LOST);
		return 0;
	}
	brief->conn_kind = conn | kind << 62;
	brief->time_ns = bpf_ktime_get_ns();
	asm volatile("" ::: "memory"); /* x86 keeps the order of stores; the compiler is to keep it too */
	*(volatile u64 *)&thread->head = head + 1;
	return 0;
}

static inline int into_shared(u32 tid, u64 conn, u32 kind)
{
	struct event *event = shared.ringbuf_reserve(sizeof(*event));

	if (!event) {
		count(LOST);
		return 0;
	}
	event->conn = conn;
	event->time_ns = bpf_ktime_get_ns();
	event->tid = tid;
	event->kind = kind;
	shared.ringbuf_submit(event, BPF_RB_NO_WAKEUP);
	return 0;
}

static inline int seen(u64 conn, u32 kind, u32 hits)
{
	u32 tid = (u32)bpf_get_current_pid_tgid();
	u32 key = tid & (THREADS - 1);
	struct thread *thread = threads.lookup(&key);

	count_quickly(hits);
	if (thread && (u32)thread->owner == tid)
		return into_own(thread, conn, kind);
	return into_shared(tid, conn, kind);
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
