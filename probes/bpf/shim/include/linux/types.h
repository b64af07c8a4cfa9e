/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The kernel's short names for the user-space API's types. */
#ifndef SHIM_LINUX_TYPES_H
#define SHIM_LINUX_TYPES_H
#include_next <linux/types.h>
typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef _Bool bool;
typedef __kernel_size_t size_t;
typedef __kernel_pid_t pid_t;
typedef unsigned long uintptr_t;
#endif
