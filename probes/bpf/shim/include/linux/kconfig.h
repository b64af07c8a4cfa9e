/* SPDX-License-Identifier: GPL-2.0-or-later */
/* bcc includes this file by name before anything else and insists on this option. */
#define CONFIG_BPF_SYSCALL 1
