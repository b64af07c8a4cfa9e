/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The memory of inter-lcore messages (DPVS src/mempool.c): one rte_mempool for each power of two from 64 bytes to 128
 * KiB, 2 MiB each, the heap beyond that. A 12-byte cookie precedes an object, so a message is aligned to 4 bytes only,
 * as in DPVS.
 */
#include "mempool.h"
#include "twin.h"

#define SMALLEST 6
#define LARGEST 17
#define POOL_BYTES (2 << 20)
#define COOKIE_MARK 0xA55AC33Cu
#define TAILER_MARK 0x5ADB2E5Bu

enum { FROM_POOL = 1, FROM_HEAP };

struct cookie {
    uint32_t mark;
    uint32_t memsize;
    uint16_t flag;
    uint16_t pool_idx;
};

static struct rte_mempool *pools[LARGEST + 1];

int dpvs_mempool_init(void)
{
    for (int bits = SMALLEST; bits <= LARGEST; bits++) {
        int count;
        unsigned cache = RTE_MEMPOOL_CACHE_MAX_SIZE / 8;
        char name[32];

        is_power2(RTE_MAX(POOL_BYTES >> bits, 16), 1, &count); /* at most 2^15 */
        if (cache >= (unsigned)count * 2 / 3)
            cache = (unsigned)count / 2;
        count--;
        snprintf(name, sizeof(name), "mp_msg_s%d_n%d", 1 << bits, count & 0xffff);
        pools[bits] = rte_mempool_create(name, (unsigned)count, 1u << bits, RTE_MIN(cache, (unsigned)count * 2 / 3), 0,
                                         NULL, NULL, NULL, NULL, SOCKET_ID_ANY, 0);
        if (!pools[bits])
            return EDPVS_NOMEM;
    }
    return EDPVS_OK;
}

/* Zeroed memory, or NULL. */
void *dpvs_mempool_get(int size)
{
    uint32_t total = (uint32_t)size + sizeof(struct cookie) + sizeof(uint32_t);
    int bits = RTE_MAX(SMALLEST, 32 - __builtin_clz(total - 1));
    const uint32_t tail = TAILER_MARK;
    void *memory = NULL;
    struct cookie *cookie;

    if (bits <= LARGEST && rte_mempool_get(pools[bits], &memory) == 0)
        memset(memory, 0, total);
    else
        memory = rte_zmalloc(NULL, total, RTE_CACHE_LINE_SIZE), bits = 0;
    if (!memory)
        return NULL;
    cookie = memory;
    cookie->mark = COOKIE_MARK;
    cookie->memsize = total;
    cookie->flag = bits ? FROM_POOL : FROM_HEAP;
    cookie->pool_idx = (uint16_t)bits;
    memcpy((char *)memory + total - sizeof(tail), &tail, sizeof(tail));
    return cookie + 1;
}

void dpvs_mempool_put(void *obj)
{
    struct cookie *cookie;
    uint32_t tail;

    if (!obj)
        return;
    cookie = (struct cookie *)obj - 1;
    assert(cookie->mark == COOKIE_MARK);
    memcpy(&tail, (char *)cookie + cookie->memsize - sizeof(tail), sizeof(tail));
    assert(tail == TAILER_MARK);
    if (cookie->flag == FROM_POOL)
        rte_mempool_put(pools[cookie->pool_idx], cookie);
    else
        rte_free(cookie);
}
