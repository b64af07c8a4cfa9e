/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The hash that DPVS divides the ports of an IPv6 address by. It is Bob Jenkins's lookup3 over 32-bit words (public
 * domain, 2006), started as DPDK starts it: rte_jhash.h, rte_jhash_32b.
 */
#include "agent.h"

#define GOLDEN_RATIO 0xdeadbeefu

static uint32_t turned(uint32_t x, unsigned by) { return x << by | x >> (32 - by); }

uint32_t hash_words(const uint32_t *words, unsigned count, uint32_t start)
{
	static const unsigned mix[6] = { 4, 6, 8, 16, 19, 4 }, last[7] = { 14, 11, 25, 16, 4, 14, 24 };
	uint32_t s[3];
	unsigned i;

	s[0] = s[1] = s[2] = GOLDEN_RATIO + count * 4 + start;
	for (; count > 3; words += 3, count -= 3) {
		for (i = 0; i < 3; i++)
			s[i] += words[i];
		for (i = 0; i < 6; i++) { /* a, b, c in turn: each takes from and adds to its neighbours */
			uint32_t *x = &s[i % 3], *before = &s[(i + 2) % 3], *after = &s[(i + 1) % 3];

			*x = (*x - *before) ^ turned(*before, mix[i]);
			*before += *after;
		}
	}
	for (i = 0; i < count; i++)
		s[i] += words[i];
	if (count)
		for (i = 0; i < 7; i++) { /* c, a, b in turn */
			uint32_t *x = &s[(i + 2) % 3], before = s[(i + 1) % 3];

			*x = (*x ^ before) - turned(before, last[i]);
		}
	return s[2];
}
