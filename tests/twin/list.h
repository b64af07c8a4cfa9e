/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Circular doubly linked lists, laid out as DPVS's (next, then prev) because an agent walks them. */
#ifndef TWIN_LIST_H
#define TWIN_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct list_head {
    struct list_head *next;
    struct list_head *prev;
};

/* An unlinked node carries these (DPVS include/list.h); a timer with prev == LIST_POISON2 is not pending. */
#define LIST_POISON1 ((struct list_head *)0x100)
#define LIST_POISON2 ((struct list_head *)0x200)

#define LIST_HEAD_INIT(name)                                                                                           \
    {                                                                                                                  \
        &(name), &(name)                                                                                               \
    }

#define list_entry(node, type, member) ((type *)((char *)(node)-offsetof(type, member)))

#define list_for_each_entry(pos, head, member)                                                                         \
    for (pos = list_entry((head)->next, __typeof__(*pos), member); &pos->member != (head);                             \
         pos = list_entry(pos->member.next, __typeof__(*pos), member))

#define list_for_each_entry_safe(pos, after, head, member)                                                             \
    for (pos = list_entry((head)->next, __typeof__(*pos), member),                                                     \
        after = list_entry(pos->member.next, __typeof__(*pos), member);                                                \
         &pos->member != (head); pos = after, after = list_entry(after->member.next, __typeof__(*after), member))

static inline void INIT_LIST_HEAD(struct list_head *head)
{
    head->next = head->prev = head;
}

static inline bool list_empty(const struct list_head *head)
{
    return head->next == head;
}

static inline void list_join(struct list_head *before, struct list_head *after)
{
    before->next = after;
    after->prev = before;
}

static inline void list_add(struct list_head *node, struct list_head *head)
{
    list_join(node, head->next);
    list_join(head, node);
}

static inline void list_add_tail(struct list_head *node, struct list_head *head)
{
    list_join(head->prev, node);
    list_join(node, head);
}

static inline void list_del(struct list_head *node)
{
    list_join(node->prev, node->next);
    node->next = LIST_POISON1;
    node->prev = LIST_POISON2;
}

static inline void list_del_init(struct list_head *node)
{
    list_join(node->prev, node->next);
    INIT_LIST_HEAD(node);
}

static inline void list_move_tail(struct list_head *node, struct list_head *head)
{
    list_join(node->prev, node->next);
    list_add_tail(node, head);
}

#endif
