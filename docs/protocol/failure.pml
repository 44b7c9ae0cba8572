/* What happens when a rank is late or dead: deadline, abort word, recovery, mask. One channel, one chunk.
 * docs/protocol.md states the rules, check.py runs the cases; the names are those of document and code.
 *
 * The rank is coarser than in exchange.pml: it waits for the flags of all ranks, reads all rows in one (late)
 * step and answers all. A deadline may pass in any wait at any time, so every slowness is covered.
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef EXCHANGES
#define EXCHANGES 4            /* the last epoch */
#endif
#ifndef T_MAX
#define T_MAX 1
#endif
#ifndef T_MOVES
#define T_MOVES 0              /* 1: T = T_MAX, 1, T_MAX, 1, ... */
#endif
#define CHUNKS 1

/* What a rank does when its deadline passes */
#define STOP     1             /* error word, abort words, and nothing more */
#define RECOVER  2             /* the same, then the collective recover() */
#define GO_ON    3             /* control: begin the next exchange */
#define ALONE    4             /* control: begin at a fresh epoch that all ranks know, without a meeting */
#ifndef ON_DEADLINE
#define ON_DEADLINE 0          /* 0: no deadline */
#endif
#ifndef DEADLINES
#define DEADLINES 1            /* how many may pass, over all ranks */
#endif
#define FRESH 3                /* ALONE: the fresh epoch */

#ifndef CUT
#define CUT 0                  /* 1: a failure on another channel may cut a send short: rows have gone out,
                                  with or without their flag */
#endif
#ifndef COUNT_LATE
#define COUNT_LATE 0           /* 1: the device word moves when the kernel of a dispatch ends well: a dispatch
                                  that was cut short or stopped in its wait is not counted */
#endif
#ifndef RECOVER_STEP
#define RECOVER_STEP 1         /* the first epoch after a recovery: the highest of all ranks + this */
#endif
#ifndef MASK
#define MASK 0                 /* 1: the last rank may die, the others then mask it; 2: any may mask any */
#endif

/* Controls: each breaks one rule. */
#ifndef NO_ABORT
#define NO_ABORT 0             /* no abort words: the others wait for deadlines of their own */
#endif
#ifndef ABORT_CLEARED
#define ABORT_CLEARED 0        /* recover() clears abort words, and the epoch they carry is not looked at */
#endif
#ifndef NOT_IDLE
#define NOT_IDLE 0             /* recover() while rows and flags are under way */
#endif
#ifndef OWN_EPOCH
#define OWN_EPOCH 0            /* recover() goes on with each rank's own epoch + 1 */
#endif

byte epoch[RANKS];             /* of the exchange begun last */
byte masked[RANKS];            /* mask word: bit p set: rank p is left out */
#define MASKED(me, p) ((masked[me] >> (p)) & 1)
#define NOBODY_READS(src, dst, e) (MASKED(dst, src) || (e) < epoch[dst])

#include "windows.pml"

mtype = { IDLE, SENT, ARRIVED, RETURNED, COMBINED };
mtype stage[RANKS] = IDLE;
bit error[RANKS];              /* error word, sticky */
bit dead[RANKS];
byte abort_word[RANKS * RANKS], way_abort[RANKS * RANKS];   /* epoch of the writer when it gave up */
byte first_epoch[RANKS];       /* first epoch after the last recovery: older abort words say nothing */
byte deadlines;                /* passed so far */
byte since_recovery;           /* passed since the last recovery */
byte meeting, agreed, leaving; /* recover(): ranks that have come, epoch agreed on, ranks still to leave */
bit in_meeting[RANKS];
bit stopped_by_old_word;       /* a rank was stopped by an abort word of before the last recovery */

#define WAITS(me)       (stage[me] == SENT || stage[me] == RETURNED)
#define HAS(kind, me, p) (MASKED(me, p) || flag_epoch[MSG(kind, p, me, 0, epoch[me])] == epoch[me])
#define HAS_ALL(kind, me) (HAS(kind, me, 0) && HAS(kind, me, 1) && HAS(kind, me, RANKS - 1))
#define IS_AHEAD(kind, me, p) (!MASKED(me, p) && flag_epoch[MSG(kind, p, me, 0, epoch[me])] > epoch[me])
#define ANY_AHEAD(kind, me) (IS_AHEAD(kind, me, 0) || IS_AHEAD(kind, me, 1) || IS_AHEAD(kind, me, RANKS - 1))
#if ABORT_CLEARED
#define TOLD_BY(me, p)  (abort_word[(p) * RANKS + me] != 0)
#else
#define TOLD_BY(me, p)  (abort_word[(p) * RANKS + me] >= first_epoch[me])
#endif
#define TOLD(me)        (TOLD_BY(me, 0) || TOLD_BY(me, 1) || TOLD_BY(me, RANKS - 1))

inline send_all(kind) {
  p = 0;
  do
  :: p < RANKS ->
     if
     :: !MASKED(me, p) ->
        store_rows(kind, me, p, 0, epoch[me], (1 << T_of[epoch[me]]) - 1);
        store_flag(kind, me, p, 0, epoch[me], 1)
     :: else
     fi;
     p++
  :: else -> break
  od;
  p = 0
}
inline read_all(kind) {
  p = 0;
  do
  :: p < RANKS ->
     if
     :: !MASKED(me, p) -> take_rows(kind, p, me, 0, epoch[me], (1 << T_of[epoch[me]]) - 1, 1)
     :: else
     fi;
     p++
  :: else -> break
  od;
  p = 0
}
/* Nobody will read what stands in the windows of this rank: bookkeeping, nothing is written. */
inline forget_rows(rank) {
  k = 0;
  do
  :: k < RANKS * T_MAX ->
     window[(DISPATCH * RANKS + rank) * RANKS * T_MAX + k] = FREE;
     window[(COMBINE * RANKS + rank) * RANKS * T_MAX + k] = FREE; k++
  :: else -> break
  od;
  k = 0
}
inline stop_and_tell() {
  error[me] = 1; p = 0;
  do
  :: p < RANKS -> if :: p != me && !NO_ABORT -> way_abort[me * RANKS + p] = epoch[me] :: else fi; p++
  :: else -> break
  od;
  p = 0
}
/* The dispatch that was under way is not counted. */
inline forget_count() {
  if :: COUNT_LATE && stage[me] == SENT -> epoch[me]--; stage[me] = IDLE :: else fi
}
#define MASK_OPTION(q) \
  :: d_step { (q) != me && (q) < RANKS && WAITS(me) && !MASKED(me, q) && (MASK == 2 || dead[q]) -> \
       masked[me] = masked[me] | (1 << (q)); p = 0; \
       do /* the rows of the masked rank are not read any more */ \
       :: p < T_of[epoch[me]] -> \
          if :: window[SLOT(DISPATCH, q, me, p, epoch[me])] == ROW(q, p, epoch[me]) -> \
                window[SLOT(DISPATCH, q, me, p, epoch[me])] = FREE :: else fi; \
          if :: window[SLOT(COMBINE, q, me, p, epoch[me])] == ROW(q, p, epoch[me]) -> \
                window[SLOT(COMBINE, q, me, p, epoch[me])] = FREE :: else fi; p++ \
       :: else -> break \
       od; p = 0 }

proctype Rank(byte me) {
  byte m, k, p;
  do
  /* the exchange */
  :: d_step { !error[me] && stage[me] == IDLE && epoch[me] < EXCHANGES ->
       epoch[me]++; send_all(DISPATCH); stage[me] = SENT }
  :: d_step { !error[me] && stage[me] == SENT && HAS_ALL(DISPATCH, me) -> stage[me] = ARRIVED }
  :: d_step { !error[me] && stage[me] == ARRIVED ->
       read_all(DISPATCH); send_all(COMBINE); stage[me] = RETURNED }
  :: d_step { !error[me] && stage[me] == RETURNED && HAS_ALL(COMBINE, me) -> stage[me] = COMBINED }
  :: d_step { !error[me] && stage[me] == COMBINED -> read_all(COMBINE); stage[me] = IDLE }
  :: d_step { !error[me] && ((stage[me] == SENT && ANY_AHEAD(DISPATCH, me)) ||
                             (stage[me] == RETURNED && ANY_AHEAD(COMBINE, me))) ->
       flag_ahead = 1; assert(!flag_ahead) }

  /* a deadline passes */
#if ON_DEADLINE == STOP || ON_DEADLINE == RECOVER
  :: d_step { !error[me] && WAITS(me) && deadlines < DEADLINES ->
       deadlines++; since_recovery++; stop_and_tell(); forget_count() }
  :: d_step { !error[me] && TOLD(me) && !in_meeting[me] ->
       stopped_by_old_word = (since_recovery == 0); assert(!stopped_by_old_word);
       error[me] = 1; forget_count() }
#endif
#if CUT
  /* what a kernel had sent when it saw the error word: rows of one exchange, without or with its flag */
  :: atomic { !error[me] && TOLD(me) && stage[me] == IDLE && epoch[me] < EXCHANGES ->
       epoch[me]++; p = 1 - me;
       d_step { store_rows(DISPATCH, me, p, 0, epoch[me], (1 << T_of[epoch[me]]) - 1) };
       if :: store_flag(DISPATCH, me, p, 0, epoch[me], 1) :: skip fi;
       p = 0; error[me] = 1; stage[me] = SENT; forget_count() }
  :: atomic { !error[me] && TOLD(me) && stage[me] == ARRIVED ->
       p = 1 - me;
       d_step { store_rows(COMBINE, me, p, 0, epoch[me], (1 << T_of[epoch[me]]) - 1) };
       if :: store_flag(COMBINE, me, p, 0, epoch[me], 1) :: skip fi;
       p = 0; error[me] = 1 }
#endif
#if ON_DEADLINE == GO_ON
  :: d_step { WAITS(me) && deadlines < DEADLINES -> deadlines++; forget_rows(me); stage[me] = IDLE }
#endif
#if ON_DEADLINE == ALONE
  :: d_step { WAITS(me) && epoch[me] < FRESH && (deadlines < DEADLINES || agreed) ->
       deadlines++; agreed = 1; forget_rows(me); epoch[me] = FRESH - 1; stage[me] = IDLE }
#endif

  /* recover(), collective: whoever has an error or is through with its work comes to it */
#if ON_DEADLINE == RECOVER
  :: d_step { !in_meeting[me] && leaving == 0 &&
              (error[me] || (since_recovery && stage[me] == IDLE && epoch[me] >= EXCHANGES)) ->
       in_meeting[me] = 1; meeting++ }
  :: d_step { meeting == RANKS && (NOT_IDLE || under_way == 0) ->   /* all streams idle, host barrier */
       agreed = epoch[0]; p = 0;
       do
       :: p < RANKS -> if :: epoch[p] > agreed -> agreed = epoch[p] :: else fi; forget_rows(p); p++
       :: else -> break
       od;
       since_recovery = 0; meeting = 0; leaving = RANKS; p = 0 }
  :: d_step { in_meeting[me] && leaving > 0 ->               /* leave; nothing in a window is cleared */
       if
       :: OWN_EPOCH -> epoch[me] = epoch[me] + RECOVER_STEP - 1
       :: else -> epoch[me] = agreed + RECOVER_STEP - 1
       fi;
       first_epoch[me] = epoch[me] + 1;
       if
       :: ABORT_CLEARED -> p = 0; do :: p < RANKS -> abort_word[p * RANKS + me] = 0; p++ :: else -> break od
       :: else
       fi;
       error[me] = 0; stage[me] = IDLE; in_meeting[me] = 0; leaving--; p = 0;
       agreed = (leaving -> agreed : 0) }
#endif

#if MASK
#if MASK == 1
  :: d_step { me == RANKS - 1 -> dead[me] = 1 }; break
#endif
  MASK_OPTION(0)
  MASK_OPTION(1)
#if RANKS > 2
  MASK_OPTION(2)
#endif
#endif

  /* the end */
#if ON_DEADLINE == STOP
  :: error[me] -> break
#endif
#if ON_DEADLINE == RECOVER
  :: atomic { stage[me] == IDLE && epoch[me] >= EXCHANGES && !error[me] && !since_recovery && !meeting &&
              epoch[0] >= EXCHANGES && epoch[1] >= EXCHANGES && epoch[RANKS - 1] >= EXCHANGES &&
              stage[0] == IDLE && stage[1] == IDLE && stage[RANKS - 1] == IDLE && !in_meeting[me] -> break }
#else
  :: stage[me] == IDLE && epoch[me] >= EXCHANGES -> break
#endif
  od
}

/* Abort words land whenever they like, after a recovery too. */
proctype AbortWire(byte writer, reader) {
end:
  do
  :: d_step { way_abort[writer * RANKS + reader] ->
       abort_word[writer * RANKS + reader] = way_abort[writer * RANKS + reader];
       way_abort[writer * RANKS + reader] = 0 }
  od
}

init {
  byte i, j, c, d, b;
  atomic {
    for (i : 1 .. EXCHANGES) {
      if :: T_MOVES && i % 2 == 0 -> T_of[i] = 1 :: else -> T_of[i] = T_MAX fi
    }
    for (i : 0 .. RANKS - 1) { first_epoch[i] = 1 }
    start_wires(i, j, d, c, b);
    for (i : 0 .. RANKS - 1) {
      for (j : 0 .. RANKS - 1) { if :: i != j && ON_DEADLINE -> run AbortWire(i, j) :: else fi };
      run Rank(i)
    }
    i = 0; j = 0; c = 0; d = 0; b = 0
  }
}
