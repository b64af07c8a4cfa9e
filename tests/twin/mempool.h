/* SPDX-License-Identifier: GPL-2.0-or-later */
#ifndef TWIN_MEMPOOL_H
#define TWIN_MEMPOOL_H

int dpvs_mempool_init(void);
void *dpvs_mempool_get(int size);
void dpvs_mempool_put(void *obj);

#endif
