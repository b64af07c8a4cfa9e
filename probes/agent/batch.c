/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Requests: taken on the master lcore, split by worker, sent in chunks, settled when every record has its code.
 *
 * Rules: the master never waits for a worker. One message is outstanding per worker, because a worker drains its whole
 * ring before it turns to packets again (DPVS 1.10.2, src/ctrl.c: msg_slave_process). A worker's part of a request keeps
 * the request's order. All state here belongs to the master, but for a chunk in flight, which is the worker's.
 *
 * How long a callback lasts is measured in it, not guessed before: it ends when its time is over, whatever is left. That is
 * the limit where the worker comes to its messages at once, because its rounds are short: it has nothing to do. Where they
 * are long there is traffic, and a callback takes no more than our share of the time since the last one.
 *
 * A record whose worker nobody can know goes to every worker, and their codes are merged. It is all or nothing: where one
 * worker cannot have the copy, the others give theirs back; where one copy has the client's packets, the rest go; where
 * one is to be ended or claimed, all are looked at before. That takes a second round of the request, and what comes of it
 * counts: a copy that could not be taken back makes the answer BUSY.
 */
#include "agent.h"

#define CHUNK_MAX 256u /* records offered at a time: more than the limit lets through */
#define CHUNK_STEP 4u  /* records between two looks at the clock */
#define PUMP_PERIOD_US 5000
#define EVERY_WORKER INT8_MAX
#define IDLE_WAIT_NS 5000  /* a message is taken that soon by a worker that has nothing to do */
#define LONG_WAIT_NS 100000 /* no more says how long a round is: the system may have stopped the worker */

struct request_slot {
	bool used;
	uint32_t count;
	uint32_t remaining; /* pieces of work to do: a record on a worker; master only */
	bool again;	    /* the second round */
	bool trial;
	uint32_t tried; /* trial: index + 1 of the record that is or was tried, written by workers */
	struct agent_result *result;
	uint8_t *codes;
	uint8_t ops[AGENT_MAX_RECORDS];
	uint16_t order[AGENT_MAX_RECORDS];	       /* record indices, grouped by worker, in request order */
	/* Each worker's part still to send: positions in `order`, and from own_end on in `every`. */
	uint16_t begin[AGENT_MAX_WORKERS], own_end[AGENT_MAX_WORKERS], end[AGENT_MAX_WORKERS];
	uint16_t every[AGENT_MAX_RECORDS], n_every; /* record indices, for all workers */
	uint64_t seen[AGENT_MAX_RECORDS];	    /* for those: bit n where a worker had code n */
	uint64_t then[AGENT_MAX_RECORDS];	    /* the same, of the second round */
	uint8_t claimed[AGENT_MAX_RECORDS];	    /* second round of a CLAIM: one worker has it */
	struct agent_record records[AGENT_MAX_RECORDS];
};

struct worker {
	unsigned lcore;
	uint8_t fifo[AGENT_MAX_REQUESTS];    /* request slots that have records for this worker */
	unsigned head, length;
	bool in_flight;
	unsigned waited;     /* periods of the pump's timer that this chunk has been out */
	uint64_t sent_ns;
	uint64_t ended_ns, wait_ns; /* the worker's: when its last callback ended; how long messages wait, on average */
	uint32_t chunk_done; /* set by the worker, cleared by the master */
	struct request_slot *chunk_request;
	struct ahead ahead; /* the worker's */
	uint16_t chunk_begin, chunk_end; /* of a chunk that is done: what was offered, and where the worker ended */
};

struct agent_results agent_results;
static struct request_slot requests[AGENT_MAX_REQUESTS];
static struct worker workers[AGENT_MAX_WORKERS];
static unsigned n_workers, port_mask, next_result, main_lcore;
static bool pump_armed;
static bool second_round; /* one has begun: workers have work again that were passed over a moment ago */
static struct timer_room pump_timer;

void batch_init(unsigned main, uint64_t worker_mask)
{
	unsigned lcore, shift = 0;

	main_lcore = main;
	for (lcore = 0; lcore < 64; lcore++)
		if (worker_mask & (1ull << lcore))
			workers[n_workers++].lcore = lcore;
	while ((1u << shift) < n_workers) /* DPVS 1.10.2, src/sa_pool.c: sa_pool_init */
		shift++;
	port_mask = (1u << shift) - 1;
}

static void count_codes(uint8_t code, uint64_t records)
{
	__atomic_fetch_add(&door.by_code[code % CODE_MAX], records, __ATOMIC_RELAXED);
}

/* Any worker can have a template; which one goes by the client, so that all that is done to it stays in order. */
static int owner_of_template(const struct agent_record *r)
{
	uint32_t words[4];

	memcpy(words, r->caddr, sizeof(words));
	return (int)(hash_words(words, 4, 0) % n_workers);
}

/* Which worker owns a session: by its local port, DPVS 1.10.2, src/sa_pool.c: sa_pool_init. Where there is none, the one
 * that the network card gives the client's packets to, which nobody but the card knows: each may be it. */
static int owner_of(const struct agent_record *r)
{
	unsigned index = ntohs(r->lport) & port_mask;

	if (r->flags & F_TEMPLATE)
		return owner_of_template(r);
	if (without_owner(r))
		return n_workers == 1 ? 0 : EVERY_WORKER;
	return index < n_workers ? (int)index : -1;
}

static bool changes_dpvs(uint8_t op) { return op == AGENT_UPSERT || op == AGENT_YIELD; }

/* Of a trial one record at most is put in, or made to wait: the rest may be once it has been looked at. */
static bool may_try(struct request_slot *request, unsigned n)
{
	uint32_t none = 0;

	if (request->ops[n] == AGENT_CLAIM)
		return false;
	return !changes_dpvs(request->ops[n]) ||
	       __atomic_compare_exchange_n(&request->tried, &none, n + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE) ||
	       none == n + 1;
}

static void was_tried(struct request_slot *request, unsigned n, uint8_t code)
{
	const struct agent_record *r = &request->records[n];
	uint32_t mine = n + 1;

	if (code == CODE_CREATED || code == CODE_UPDATED || code == CODE_YIELDED)
		request->result->conn = r->flags & F_TEMPLATE ? address_of_template(r) : address_of_session(r);
	else if (changes_dpvs(request->ops[n]) && owner_of(r) != EVERY_WORKER) /* another may be it */
		__atomic_compare_exchange_n(&request->tried, &mine, 0, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/* What is to be done about a record that all workers have, now that they have looked. */
static uint8_t second_time(struct request_slot *request, unsigned n)
{
	const struct agent_record *r = &request->records[n];
	uint8_t none = 0;

	if (request->ops[n] != AGENT_CLAIM || (request->seen[n] & 1ull << CODE_LIVE)) /* of two live copies the one that has the client's packets stays */
		return withdraw_session(r, request->seen[n] & 1ull << CODE_LIVE);
	/* One copy is the session from now on. The others go on waiting: the client's packets may come to any of them. */
	if (look_at_session(r) == CODE_WAITING &&
	    __atomic_compare_exchange_n(&request->claimed[n], &none, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
		return claim_session(r);
	return look_at_session(r);
}

static uint8_t work_on(struct request_slot *request, unsigned n, struct worker *w)
{
	const struct agent_record *r = &request->records[n];
	bool everywhere = without_owner(r) && n_workers > 1;
	uint8_t code;

	if (!is_ready())
		return CODE_RETIRED;
	if (request->again)
		return second_time(request, n);
	if (request->trial && !may_try(request, n))
		return CODE_BUSY;
	if (r->flags & F_TEMPLATE) {
		code = work_on_template(r, request->ops[n], w->lcore);
	} else {
		switch (request->ops[n]) {
		case AGENT_UPSERT:
			code = upsert_session(r, w->lcore, &w->ahead);
			break;
		case AGENT_DELETE:
			code = everywhere ? look_at_session(r) : delete_session(r);
			break;
		case AGENT_CLAIM:
			code = everywhere ? look_at_session(r) : claim_session(r);
			break;
		case AGENT_YIELD:
			code = yield_session(r);
			break;
		default:
			code = look_at_session(r);
		}
	}
	if (request->trial)
		was_tried(request, n, code);
	return code;
}

/* Before the record at position i of the chunk: ask for what those behind it will need. */
static void look_ahead(struct worker *w, const struct request_slot *request, unsigned own_end, unsigned i)
{
	unsigned first = w->chunk_begin, end = w->chunk_end;

	if (i < own_end)
		ahead_of(&w->ahead, request->records, request->order, first, i, end < own_end ? end : own_end);
	else
		ahead_of(&w->ahead, request->records, request->every, first < own_end ? 0 : first - own_end, i - own_end,
			 end - own_end);
}

/* How long this callback may last. */
static uint64_t allowance(struct worker *w, uint64_t now)
{
	uint64_t share = config.worker_share, allowed = (now - w->ended_ns) * share / (100 - share), wait = now - w->sent_ns;

	w->wait_ns = (7 * w->wait_ns + (wait < LONG_WAIT_NS ? wait : LONG_WAIT_NS)) / 8;
	if (w->wait_ns < IDLE_WAIT_NS)
		return config.chunk_limit_ns;
	return allowed < config.chunk_limit_ns ? allowed : config.chunk_limit_ns;
}

int batch_work(void *msg)
{
	struct worker *w = getp(AT(msg, dpvs_msg, data));
	struct agent_worker_stats *stats;
	struct request_slot *request;
	void *done;
	uint64_t begin = now_ns(), now = begin, until;
	unsigned i, n, own_end, counts[CODE_MAX] = { 0 };
	uint8_t code;

	if (w < workers || w >= workers + n_workers || w->lcore != per_lcore__lcore_id || w->chunk_done) {
		poison("a message for another worker arrived on lcore %u", per_lcore__lcore_id);
		return EDPVS_INVAL;
	}
	request = w->chunk_request;
	stats = &door.workers[w - workers];
	own_end = request->own_end[w - workers];
	until = begin + allowance(w, begin);
	for (i = w->chunk_begin; i < w->chunk_end; i++) {
		if (i != w->chunk_begin && (i - w->chunk_begin) % CHUNK_STEP == 0) {
			now = now_ns();
			if (now >= until)
				break;
		}
		look_ahead(w, request, own_end, i);
		n = i < own_end ? request->order[i] : request->every[i - own_end];
		code = work_on(request, n, w);
		if (i < own_end) {
			request->codes[n] = code == CODE_LIVE_UNHEARD ? CODE_LIVE : code;
			counts[request->codes[n] % CODE_MAX]++;
		} else {
			__atomic_fetch_or(request->again ? &request->then[n] : &request->seen[n], 1ull << code,
					  __ATOMIC_RELAXED);
		}
	}
	w->chunk_end = (uint16_t)i;
	for (n = 0; n < CODE_MAX; n++)
		if (counts[n])
			count_codes((uint8_t)n, counts[n]);
	now = now_ns();
	stats->chunks++;
	stats->records += w->chunk_end - w->chunk_begin;
	stats->busy_ns += now - begin;
	if (now - begin > stats->max_ns)
		stats->max_ns = now - begin;
	if (now - begin > AGENT_LATE_NS)
		stats->late++;
	w->ended_ns = now;
	__atomic_store_n(&w->chunk_done, 1, __ATOMIC_RELEASE);
	/* ring the master's bell; if that fails its timer finds chunk_done a little later */
	done = dpvs.msg_make(config.msg_type_done, 0, MSG_UNICAST, (uint8_t)w->lcore, sizeof(w), &w);
	if (done) {
		dpvs.msg_send(done, (uint8_t)main_lcore, MSG_F_ASYNC, NULL);
		dpvs.msg_destroy(&done);
	}
	return EDPVS_OK;
}

/* With nothing outstanding, each record that was ever taken has been counted under one code. */
static void check_sums(void)
{
	uint64_t sum = 0;
	unsigned i;

	for (i = 0; i < CODE_MAX; i++)
		sum += __atomic_load_n(&door.by_code[i], __ATOMIC_RELAXED);
	if (sum != door.accepted)
		poison("%llu records were taken and %llu have a code", (unsigned long long)door.accepted,
		       (unsigned long long)sum);
}

static void queue(struct request_slot *request, unsigned worker)
{
	struct worker *w = &workers[worker];

	if (request->begin[worker] == request->end[worker])
		return;
	w->fifo[(w->head + w->length) % AGENT_MAX_REQUESTS] = (uint8_t)(request - requests);
	w->length++;
}

enum {
	SEEN_LIVE = 1 << CODE_LIVE,
	SEEN_UNHEARD = 1 << CODE_LIVE_UNHEARD,
	SEEN_WAITING = 1 << CODE_CREATED | 1 << CODE_UPDATED | 1 << CODE_WAITING,
};

static void decide(struct request_slot *request, unsigned record, uint8_t code)
{
	request->codes[record] = code;
	count_codes(code, 1);
}

/* Does what the workers had of a record ask for a second round? */
static bool asks_again(uint8_t op, uint64_t seen)
{
	uint8_t code = merge_codes(seen);
	bool all_wait = code == CODE_CREATED || code == CODE_UPDATED || code == CODE_WAITING;

	if (seen & SEEN_LIVE)
		return seen & (SEEN_WAITING | SEEN_UNHEARD);
	if (seen & SEEN_UNHEARD) /* the client's packets may still come to any of those that wait */
		return false;
	if (!(seen & SEEN_WAITING))
		return false;
	return !all_wait || op == AGENT_DELETE || op == AGENT_CLAIM;
}

/* Every worker has said its code. Sort out what needs a second round; true if there is something. */
static bool look_again(struct request_slot *request)
{
	unsigned i, n, left = 0;

	for (i = 0; i < request->n_every; i++) {
		unsigned record = request->every[i];
		uint64_t seen = request->seen[record];
		uint8_t code = merge_codes(seen);

		if (!asks_again(request->ops[record], seen)) {
			/* to who asks whether others may go, a session that its client has not been heard on waits */
			bool unheard = (seen & SEEN_UNHEARD) && !(seen & SEEN_LIVE) && request->ops[record] == AGENT_CHECK;

			decide(request, record, unheard ? CODE_WAITING : code);
			continue;
		}
		request->then[record] = 0;
		request->claimed[record] = 0;
		request->every[left++] = (uint16_t)record;
		if (request->tried == record + 1) /* whatever was shown of it may be gone */
			request->result->conn = 0;
	}
	request->n_every = (uint16_t)left;
	if (!left)
		return false;
	request->again = second_round = true;
	request->remaining = left * n_workers;
	for (n = 0; n < n_workers; n++) {
		request->begin[n] = request->own_end[n] = 0;
		request->end[n] = (uint16_t)left;
		queue(request, n);
	}
	return true;
}

/* The codes after the second round: what the first one found apart from copies that wait, and what the second one did. */
static void conclude(struct request_slot *request)
{
	unsigned i;

	for (i = 0; i < request->n_every; i++) {
		unsigned record = request->every[i];
		uint64_t then = request->then[record];

		decide(request, record,
		       then & 1ull << CODE_BUSY ? CODE_BUSY
						: merge_codes((request->seen[record] & ~(uint64_t)SEEN_WAITING) | then));
	}
}

static void settle(struct request_slot *request, unsigned pieces)
{
	request->remaining -= pieces;
	if (request->remaining || (!request->again && request->n_every && look_again(request)))
		return;
	if (request->again)
		conclude(request);
	if (memchr(request->codes, CODE_PENDING, request->count))
		poison("a request ended with records that have no code");
	request->result->end_ns = now_ns();
	__atomic_store_n(&request->result->done, request->count, __ATOMIC_RELEASE);
	request->used = false;
	if (__atomic_sub_fetch(&door.outstanding, 1, __ATOMIC_RELEASE) == 0)
		check_sums();
}

static void pump(struct worker *w)
{
	unsigned index = (unsigned)(w - workers), size;
	struct request_slot *request;
	void *msg;

	if (w->in_flight) {
		if (!__atomic_load_n(&w->chunk_done, __ATOMIC_ACQUIRE))
			return;
		w->in_flight = false;
		request = w->chunk_request;
		request->begin[index] = w->chunk_end;
		if (request->begin[index] == request->end[index]) {
			w->head = (w->head + 1) % AGENT_MAX_REQUESTS;
			w->length--;
		}
		settle(request, w->chunk_end - w->chunk_begin);
	}
	if (!w->length)
		return;
	request = &requests[w->fifo[w->head]];
	size = request->end[index] - request->begin[index];
	w->chunk_request = request;
	w->chunk_begin = request->begin[index];
	w->chunk_end = (uint16_t)(w->chunk_begin + (size < CHUNK_MAX ? size : CHUNK_MAX));
	w->chunk_done = 0;
	w->waited = 0;
	msg = dpvs.msg_make(config.msg_type_work, 0, MSG_UNICAST, (uint8_t)main_lcore, sizeof(w), &w);
	if (!msg)
		return; /* the timer tries again */
	w->sent_ns = now_ns();
	w->in_flight = dpvs.msg_send(msg, (uint8_t)w->lcore, MSG_F_ASYNC, NULL) == EDPVS_OK;
	dpvs.msg_destroy(&msg);
}

static void pump_all(void)
{
	unsigned i;

	do {
		second_round = false;
		for (i = 0; i < n_workers; i++)
			pump(&workers[i]);
	} while (second_round);
}

/* A worker that does not come back is no worker any more, or is not what we take it for. Counted in periods of the master's
 * timer: a process that was stopped as a whole has not been late. */
static void watch(void)
{
	unsigned i;

	for (i = 0; i < n_workers; i++)
		if (workers[i].in_flight && ++workers[i].waited > config.watchdog_ms / (PUMP_PERIOD_US / 1000))
			poison("lcore %u has not answered for %u ms", workers[i].lcore, config.watchdog_ms);
}

static int on_pump_timer(void *arg)
{
	(void)arg;
	pump_all();
	watch();
	pump_armed = door.outstanding != 0;
	return pump_armed ? DTIMER_OK : DTIMER_STOP;
}

int batch_done(void *msg)
{
	struct worker *w = getp(AT(msg, dpvs_msg, data));

	if (w >= workers && w < workers + n_workers)
		pump_all(); /* its end may be the beginning of the others' second round */
	return EDPVS_OK;
}

/* ---- requests, on the master ---- */

/* The oldest result; one that is not there yet is passed over, however long it takes. */
static unsigned oldest_result(void)
{
	unsigned i, at;

	do {
		at = next_result;
		next_result = (next_result + 1) % AGENT_RESULTS;
		for (i = 0; i < AGENT_MAX_REQUESTS; i++)
			if (requests[i].used && requests[i].result == &agent_results.heads[at])
				break;
	} while (i < AGENT_MAX_REQUESTS);
	return at;
}

static int accept_batch(const struct agent_request *head, const uint8_t *ops, const struct agent_record *records)
{
	int8_t owner[AGENT_MAX_RECORDS];
	struct request_slot *request = NULL;
	struct agent_result *result;
	struct timeval period = { 0, PUMP_PERIOD_US };
	unsigned i, n, at, refused = 0;

	for (i = 0; i < AGENT_RESULTS; i++)
		if (agent_results.heads[i].request_id == head->request_id)
			return EDPVS_EXIST;
	for (i = 0; i < AGENT_MAX_REQUESTS && !request; i++)
		if (!requests[i].used)
			request = &requests[i];
	if (!request) {
		door.busy++;
		return EDPVS_BUSY;
	}
	at = oldest_result();
	result = &agent_results.heads[at];
	request->codes = agent_results.codes[at];
	__atomic_store_n(&result->done, 0, __ATOMIC_RELAXED);
	result->count = head->count;
	memset(request->codes, CODE_PENDING, head->count);
	result->begin_ns = now_ns();
	result->end_ns = 0;
	result->conn = 0;
	__atomic_store_n(&result->request_id, head->request_id, __ATOMIC_RELEASE);

	request->used = true;
	request->again = false;
	request->count = request->remaining = head->count;
	request->n_every = 0;
	request->result = result;
	request->trial = head->op == AGENT_TRIAL;
	request->tried = 0;
	memcpy(request->ops, ops, head->count);
	memcpy(request->records, records, head->count * sizeof(*records));
	__atomic_fetch_add(&door.outstanding, 1, __ATOMIC_RELAXED);
	door.accepted += head->count;

	memset(request->end, 0, sizeof(request->end));
	for (i = 0; i < head->count; i++) {
		uint8_t code = check_record(&request->records[i]);

		if (!code && ops[i] != AGENT_UPSERT && ops[i] != AGENT_DELETE && ops[i] != AGENT_CHECK &&
		    ops[i] != AGENT_YIELD && ops[i] != AGENT_CLAIM)
			code = CODE_BAD_RECORD;
		owner[i] = code ? -1 : (int8_t)owner_of(&request->records[i]);
		if (owner[i] < 0) {
			request->codes[i] = code ? code : CODE_WRONG_WORKER;
			count_codes(request->codes[i], 1);
			refused++;
		} else if (owner[i] == EVERY_WORKER) {
			request->every[request->n_every++] = (uint16_t)i;
			request->seen[i] = 0;
			request->remaining += n_workers - 1;
		} else {
			request->end[owner[i]]++;
		}
	}
	for (n = 0, at = 0; n < n_workers; n++) { /* `end` holds how many: make it where each worker's part is to end */
		request->begin[n] = (uint16_t)at;
		at += request->end[n];
		request->end[n] = request->begin[n];
	}
	for (i = 0; i < head->count; i++)
		if (owner[i] >= 0 && owner[i] != EVERY_WORKER)
			request->order[request->end[owner[i]]++] = (uint16_t)i;
	for (n = 0; n < n_workers; n++) {
		request->own_end[n] = request->end[n];
		request->end[n] = (uint16_t)(request->end[n] + request->n_every);
		queue(request, n);
	}
	settle(request, refused);
	pump_all();
	if (!pump_armed && door.outstanding) {
		pump_armed = true;
		dpvs.dpvs_timer_sched_period(&pump_timer, &period, on_pump_timer, NULL, true);
	}
	return EDPVS_OK;
}

int batch_set(uint32_t opt, const void *in, size_t in_bytes)
{
	struct agent_request head;
	const char *body = in;
	size_t padded;

	door.requests++;
	if (opt != config.sockopt_set_conn || !in || in_bytes < sizeof(head))
		goto malformed;
	memcpy(&head, in, sizeof(head));
	if (head.magic != AGENT_REQUEST_MAGIC || head.abi != AGENT_ABI || head.op < AGENT_HELLO ||
	    head.op > AGENT_TRIAL || head.count > AGENT_MAX_RECORDS || !head.request_id)
		goto malformed;
	padded = (head.count + 7u) & ~(size_t)7;
	if (head.op == AGENT_BATCH || head.op == AGENT_TRIAL
		    ? !head.count || head.record_bytes != sizeof(struct agent_record) ||
			      in_bytes != sizeof(head) + padded + head.count * sizeof(struct agent_record)
		    : head.count || in_bytes != sizeof(head))
		goto malformed;
	if (head.token != door.token) {
		door.wrong_token++;
		return EDPVS_INVAL;
	}
	switch (head.op) {
	case AGENT_HELLO:
		door.hello_nonce = head.request_id;
		return EDPVS_OK;
	case AGENT_RETIRE: /* what is under way ends with CODE_RETIRED */
		if (door.state == AGENT_READY)
			set_state(AGENT_RETIRED, NULL);
		return EDPVS_OK;
	case AGENT_REVIVE:
		if (door.state == AGENT_RETIRED)
			set_state(AGENT_READY, NULL);
		return door.state == AGENT_READY ? EDPVS_OK : EDPVS_DISABLED;
	default:
		if (!is_ready()) {
			door.refused++;
			return EDPVS_DISABLED;
		}
		body += sizeof(head);
		/* the body follows a header of 24 and one of 64 bytes in a cache-aligned block: aligned to 8 */
		return accept_batch(&head, (const uint8_t *)body,
				    (const struct agent_record *)(const void *)(body + padded));
	}
malformed:
	door.malformed++;
	return EDPVS_INVAL;
}
