/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Requests: taken on the master lcore, split by worker, sent in chunks, settled when every record has its code.
 *
 * Rules: the master never waits for a worker. One message is outstanding per worker, because a worker drains its whole
 * ring before it turns to packets again (DPVS 1.10.2, src/ctrl.c: msg_slave_process). A worker's part of a request keeps
 * the request's order. All state here belongs to the master, but for a chunk in flight, which is the worker's.
 */
#include "agent.h"

#define CHUNK_MIN 4u
#define CHUNK_MAX 64u
#define CHUNK_START 16u
#define PUMP_PERIOD_US 5000

struct request_slot {
	bool used;
	uint32_t count;
	uint32_t remaining; /* records without a final code; master only */
	struct agent_result *result;
	uint8_t ops[AGENT_MAX_RECORDS];
	uint16_t order[AGENT_MAX_RECORDS];	       /* record indices, grouped by worker, in request order */
	uint16_t begin[AGENT_MAX_WORKERS], end[AGENT_MAX_WORKERS]; /* each worker's part of `order` still to send */
	struct agent_record records[AGENT_MAX_RECORDS];
};

struct worker {
	unsigned lcore;
	uint32_t shape;			     /* records in the next chunk */
	uint8_t fifo[AGENT_MAX_REQUESTS];    /* request slots that have records for this worker */
	unsigned head, length;
	bool in_flight;
	uint32_t chunk_done; /* set by the worker, cleared by the master */
	struct request_slot *chunk_request;
	uint16_t chunk_begin, chunk_end;
};

static struct request_slot requests[AGENT_MAX_REQUESTS];
static struct worker workers[AGENT_MAX_WORKERS];
static unsigned n_workers, port_mask, next_result, main_lcore;
static bool pump_armed;
static struct timer_room pump_timer;

void batch_init(unsigned main, uint64_t worker_mask)
{
	unsigned lcore, shift = 0;

	main_lcore = main;
	for (lcore = 0; lcore < 64; lcore++)
		if (worker_mask & (1ull << lcore)) {
			workers[n_workers].lcore = lcore;
			workers[n_workers++].shape = CHUNK_START;
		}
	while ((1u << shift) < n_workers) /* DPVS 1.10.2, src/sa_pool.c: sa_pool_init */
		shift++;
	port_mask = (1u << shift) - 1;
}

static void count_code(uint8_t code) { __atomic_fetch_add(&door.by_code[code % CODE_MAX], 1, __ATOMIC_RELAXED); }

int batch_work(void *msg)
{
	struct worker *w = getp(AT(msg, dpvs_msg, data));
	struct agent_worker_stats *stats;
	struct request_slot *request;
	void *done;
	uint64_t begin = now_ns(), spent;
	unsigned i;

	if (w < workers || w >= workers + n_workers || w->lcore != per_lcore__lcore_id) {
		poison("a message for another worker arrived on lcore %u", per_lcore__lcore_id);
		return EDPVS_INVAL;
	}
	request = w->chunk_request;
	stats = &door.workers[w - workers];
	for (i = w->chunk_begin; i < w->chunk_end; i++) {
		unsigned n = request->order[i];
		const struct agent_record *r = &request->records[n];
		uint8_t code;

		if (!is_ready())
			code = CODE_RETIRED;
		else if (request->ops[n] == AGENT_UPSERT)
			code = upsert_session(r, w->lcore);
		else
			code = delete_session(r);
		request->result->codes[n] = code;
		count_code(code);
	}
	spent = now_ns() - begin;
	stats->chunks++;
	stats->records += w->chunk_end - w->chunk_begin;
	stats->busy_ns += spent;
	if (spent > stats->max_ns)
		stats->max_ns = spent;
	/* half as much next time when it took too long, a little more when there was room */
	if (spent > config.chunk_limit_ns)
		w->shape = w->shape / 2 > CHUNK_MIN ? w->shape / 2 : CHUNK_MIN;
	else if (spent < config.chunk_limit_ns / 2 && w->shape < CHUNK_MAX)
		w->shape++;
	__atomic_store_n(&w->chunk_done, 1, __ATOMIC_RELEASE);
	/* ring the master's bell; if that fails its timer finds chunk_done a little later */
	done = dpvs.msg_make(config.msg_type_done, 0, MSG_UNICAST, (uint8_t)w->lcore, sizeof(w), &w);
	if (done) {
		dpvs.msg_send(done, (uint8_t)main_lcore, MSG_F_ASYNC, NULL);
		dpvs.msg_destroy(&done);
	}
	return EDPVS_OK;
}

static void settle(struct request_slot *request, unsigned records)
{
	request->remaining -= records;
	if (request->remaining)
		return;
	request->result->end_ns = now_ns();
	__atomic_store_n(&request->result->done, request->count, __ATOMIC_RELEASE);
	request->used = false;
	__atomic_fetch_sub(&door.outstanding, 1, __ATOMIC_RELAXED);
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
	w->chunk_end = (uint16_t)(w->chunk_begin + (size < w->shape ? size : w->shape));
	w->chunk_done = 0;
	msg = dpvs.msg_make(config.msg_type_work, 0, MSG_UNICAST, (uint8_t)main_lcore, sizeof(w), &w);
	if (!msg)
		return; /* the timer tries again */
	w->in_flight = dpvs.msg_send(msg, (uint8_t)w->lcore, MSG_F_ASYNC, NULL) == EDPVS_OK;
	dpvs.msg_destroy(&msg);
}

static void pump_all(void)
{
	unsigned i;

	for (i = 0; i < n_workers; i++)
		pump(&workers[i]);
}

static int on_pump_timer(void *arg)
{
	(void)arg;
	pump_all();
	pump_armed = door.outstanding != 0;
	return pump_armed ? DTIMER_OK : DTIMER_STOP;
}

int batch_done(void *msg)
{
	struct worker *w = getp(AT(msg, dpvs_msg, data));

	if (w >= workers && w < workers + n_workers)
		pump(w);
	return EDPVS_OK;
}

/* ---- requests, on the master ---- */

/* Which worker owns a session: by its local port, DPVS 1.10.2, src/sa_pool.c: sa_pool_init. Where there is none, the one
 * that the network card gives the client's packets to, which nobody but the card knows. */
static int owner_of(const struct agent_record *r)
{
	unsigned index = ntohs(r->lport) & port_mask;

	if (r->fwdmode != FWD_FNAT)
		return n_workers == 1 ? 0 : -1;
	return index < n_workers ? (int)index : -1;
}

static int accept_batch(const struct agent_request *head, const uint8_t *ops, const struct agent_record *records)
{
	int8_t owner[AGENT_MAX_RECORDS];
	struct request_slot *request = NULL;
	struct agent_result *result;
	struct timeval period = { 0, PUMP_PERIOD_US };
	unsigned i, n, at, refused = 0;

	for (i = 0; i < AGENT_RESULTS; i++)
		if (door.results[i].request_id == head->request_id)
			return EDPVS_EXIST;
	for (i = 0; i < AGENT_MAX_REQUESTS && !request; i++)
		if (!requests[i].used)
			request = &requests[i];
	if (!request) {
		door.busy++;
		return EDPVS_BUSY;
	}
	result = &door.results[next_result++ % AGENT_RESULTS];
	__atomic_store_n(&result->done, 0, __ATOMIC_RELAXED);
	result->count = head->count;
	memset(result->codes, CODE_PENDING, sizeof(result->codes));
	result->begin_ns = now_ns();
	result->end_ns = 0;
	__atomic_store_n(&result->request_id, head->request_id, __ATOMIC_RELEASE);

	request->used = true;
	request->count = request->remaining = head->count;
	request->result = result;
	memcpy(request->ops, ops, head->count);
	memcpy(request->records, records, head->count * sizeof(*records));
	__atomic_fetch_add(&door.outstanding, 1, __ATOMIC_RELAXED);

	for (i = 0; i < head->count; i++) {
		uint8_t code = check_record(&request->records[i]);

		if (!code && ops[i] != AGENT_UPSERT && ops[i] != AGENT_DELETE)
			code = CODE_BAD_RECORD;
		owner[i] = code ? -1 : (int8_t)owner_of(&request->records[i]);
		if (owner[i] < 0) {
			result->codes[i] = code ? code : CODE_WRONG_WORKER;
			count_code(result->codes[i]);
			refused++;
		}
	}
	for (n = 0, at = 0; n < n_workers; n++) {
		request->begin[n] = (uint16_t)at;
		for (i = 0; i < head->count; i++)
			if (owner[i] == (int8_t)n)
				request->order[at++] = (uint16_t)i;
		request->end[n] = (uint16_t)at;
		if (request->begin[n] != request->end[n]) {
			struct worker *w = &workers[n];

			w->fifo[(w->head + w->length) % AGENT_MAX_REQUESTS] = (uint8_t)(request - requests);
			w->length++;
		}
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
	    head.op > AGENT_REVIVE || head.count > AGENT_MAX_RECORDS || !head.request_id)
		goto malformed;
	padded = (head.count + 7u) & ~(size_t)7;
	if (head.op == AGENT_BATCH
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
