/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The registers of a stopped x86-64 thread, as the kernel lays them out for a probe program. */
#ifndef SHIM_UAPI_LINUX_PTRACE_H
#define SHIM_UAPI_LINUX_PTRACE_H
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx;
	unsigned long r11, r10, r9, r8, ax, cx, dx, si, di;
	unsigned long orig_ax, ip, cs, flags, sp, ss;
};
#endif
