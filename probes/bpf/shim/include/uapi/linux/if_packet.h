/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Asked for by bcc's helpers, used by none of our programs. */
