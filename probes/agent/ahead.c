/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the next records will need of DPVS's memory, asked for before their turn. Most of the time that a session takes is
 * waiting for cache lines that nobody looked at lately, one after the other: the heads of its two chains in the worker's
 * hash table, and the sessions in them (1.10.2, src/ipvs/ip_vs_conn.c: dp_vs_conn_get, __dp_vs_conn_hash).
 *
 * Rules: nothing here changes what becomes of a record. The table is DPVS's own and static; where it is shows in each
 * session that DPVS has just made, which stands at the head of its two chains. Until PROOFS of them in a row have said the
 * same place, no byte of the table is read, and one that says another ends it for good. All of it runs on the worker
 * whose table it is, so nothing that is read is in the middle of a change.
 */
#include "agent.h"

#define TABLE_MASK ((1u << 20) - 1) /* DPVS_CONN_TBL_BITS, in every release */
#define PROOFS 64
#define LINE 64

/* How many records before its turn a record passes each stage; the last ones go down the chain of the client's side. */
static const uint8_t distance[] = { 12, 8, 6, 4, 2 };
enum { KEYS, HEADS, SESSIONS, STAGES = sizeof(distance) };
_Static_assert(AHEAD_ROOM > 12, "room for the keys of those that are ahead");

static uint32_t key_of_client(const struct agent_record *r)
{
	return dpvs.dp_vs_conn_hashkey(r->af, r->caddr, r->cport, r->vaddr, r->vport, TABLE_MASK);
}

static uint32_t key_of_server(const struct agent_record *r)
{
	return dpvs.dp_vs_conn_hashkey(r->af_out, r->daddr, r->dport, r->laddr, r->lport, TABLE_MASK);
}

void ahead_learn(struct ahead *a, void *conn, const struct agent_record *r)
{
	struct list_head *of_client, *of_server, *table;

	if (a->proofs >= PROOFS || a->unknown || !dpvs.dp_vs_conn_hashkey)
		return;
	of_client = AT(conn, dp_vs_conn, tuplehash);
	of_server = (void *)((char *)of_client + SIZE_OF(conn_tuple_hash)); /* the later one of the two to go in */
	table = of_server->prev - key_of_server(r);
	if ((a->proofs && table != a->table) ||
	    (of_client->prev != of_server && of_client->prev != table + key_of_client(r))) {
		a->unknown = true;
		return;
	}
	a->table = table;
	a->proofs++;
}

/* One session of the client's chain: `number` as it stands there. If it is the record's, what of it will be needed;
 * else the next one. Those before it have been looked at, and are at hand. A node of the other direction is taken for
 * one that begins a node later: what is read is inside the same session then, and a wrong guess costs a cache line. */
static void go_down(const struct list_head *head, const struct agent_record *r, unsigned number)
{
	const struct list_head *node = head->next;
	const char *conn;
	unsigned i;

	for (;; node = node->next) {
		if (node == head)
			return;
		conn = (const char *)node - config.offsets[OFF_dp_vs_conn_tuplehash];
		if (get16(AT(conn, dp_vs_conn, cport)) == r->cport)
			break;
		if (!number--) {
			__builtin_prefetch(node->next, 1);
			return;
		}
	}
	if (!number)
		for (i = 0; i < SIZE_OF(dp_vs_conn); i += LINE)
			__builtin_prefetch(conn + i, 1);
}

static void pass(struct ahead *a, unsigned stage, const struct agent_record *r, unsigned at)
{
	uint32_t *keys = a->keys[at % AHEAD_ROOM];

	if (r->flags & F_TEMPLATE) /* in another table */
		return;
	switch (stage) {
	case KEYS:
		keys[0] = key_of_client(r);
		keys[1] = key_of_server(r);
		__builtin_prefetch(&a->table[keys[0]], 1);
		__builtin_prefetch(&a->table[keys[1]], 1);
		break;
	case HEADS: /* the first of each chain: it is compared, and written to when another one comes before it */
		__builtin_prefetch(a->table[keys[0]].next, 1);
		__builtin_prefetch(a->table[keys[1]].next, 1);
		break;
	default:
		go_down(&a->table[keys[0]], r, stage - SESSIONS);
	}
}

void ahead_of(struct ahead *a, const struct agent_record *records, const uint16_t *order, unsigned first, unsigned at,
	      unsigned end)
{
	unsigned stage, i;

	if (a->proofs < PROOFS || a->unknown)
		return;
	for (stage = 0; stage < STAGES; stage++)
		for (i = at == first ? at : at + distance[stage]; i <= at + distance[stage] && i < end; i++)
			pass(a, stage, &records[order[i]], i);
}
