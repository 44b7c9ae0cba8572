/* The exchange protocol of one channel without failures: alternation, slots, chunks, closing, wrap, banks.
 * docs/protocol.md states the rules, check.py runs the cases; the names are those of document and code.
 *
 * Every rank runs one Lane for each (peer, chunk): store the dispatch, wait for the peer's and read it, store
 * the combine, wait for the peer's and read it. A chunk is thus like one more source. Lanes of a rank run
 * freely except where a rule says "all" (MAY_DISPATCH, MAY_COMBINE). One peer of a rank is the rank itself.
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef EXCHANGES
#define EXCHANGES 3
#endif
#ifndef T_MAX
#define T_MAX 1                /* slots per source in a window */
#endif
#ifndef CHUNKS
#define CHUNKS 1               /* flags per source (1 or 2) */
#endif
#ifndef CHUNKS_FOLLOW_T
#define CHUNKS_FOLLOW_T 0      /* 1: a small T has fewer chunks, the other flags are left alone */
#endif
#ifndef T_MOVES
#define T_MOVES 0              /* slots move: 1: T of each exchange is 1 or T_MAX; 2: T_MAX, 1, T_MAX, ... */
#endif
#ifndef LIVE
#define LIVE 0                 /* 0: every token goes to every rank; 1: any set of tokens, none included */
#endif
#ifndef OPEN
#define OPEN 1                 /* exchanges of the channel that may be open at once */
#endif
#ifndef CLOSE
#define CLOSE 0                /* 1: any rank may close any exchange instead of combining */
#endif
#ifndef SKIP
#define SKIP 0                 /* 1: any exchange may lack its combine on all ranks, not replaced */
#endif
#ifndef EPOCHS
#define EPOCHS 64              /* flags carry epoch % EPOCHS */
#endif
#ifndef COMPARE
#define COMPARE 0              /* accept a flag that is 0: ==, 1: unsigned >=, 2: at a signed distance >= 0 */
#endif

#ifndef READ_AT_ONCE
#define READ_AT_ONCE 0         /* smaller search: flag and rows are taken in one step, which may come late */
#endif

/* Controls: each breaks one rule (1), and the search must then find a failure. */
#ifndef COMBINE_PER_SOURCE
#define COMBINE_PER_SOURCE 0   /* combine goes to a source once that source's dispatch is read, not all */
#endif
#ifndef DISPATCH_PER_PEER
#define DISPATCH_PER_PEER 0    /* dispatch n+1 goes to a peer once that peer's combine n is read, not all */
#endif
#ifndef COMBINE_BEFORE_READ
#define COMBINE_BEFORE_READ 0  /* combine goes out when the dispatch has arrived, a reader is still busy */
#endif
#ifndef FIRST_CHUNK_ONLY
#define FIRST_CHUNK_ONLY 0     /* the reader of every chunk waits for the flag of chunk 0 */
#endif
#ifndef EMPTY_CHUNK_SILENT
#define EMPTY_CHUNK_SILENT 0   /* a chunk without rows is not flagged */
#endif
#ifndef CLOSE_UNSEEN
#define CLOSE_UNSEEN 0         /* a rank closes without having waited for the dispatch flags */
#endif
#ifndef CLOSED_AS_ZERO
#define CLOSED_AS_ZERO 0       /* a rank that expects data takes CLOSED for "no rows" */
#endif

#include "windows.pml"

#if COMPARE == 0
#define ACCEPT(f, e) ((f) % EPOCHS == (e) % EPOCHS)
#elif COMPARE == 1
#define ACCEPT(f, e) ((f) % EPOCHS >= (e) % EPOCHS)
#else
#define ACCEPT(f, e) (((f) % EPOCHS + EPOCHS - (e) % EPOCHS) % EPOCHS < EPOCHS / 2)
#endif

/* how far each lane is: the last exchange whose step is over */
#define LANE(me, peer, chunk, e) ((((me) * RANKS + (peer)) * CHUNKS + (chunk)) * OPEN + (e) % OPEN)
#define LANES (RANKS * RANKS * CHUNKS * OPEN)
byte dispatched[LANES], arrived[LANES], was_read[LANES], finished[LANES];
bit closes[RANKS * OPEN];      /* this rank closes the exchange instead of combining it */
bit skipped[EXCHANGES + 1];
bit result_incomplete;         /* an exchange ended without an error and without all rows due */

#define ALL_CHUNKS(step, me, p, e) (step[LANE(me, p, 0, e)] >= (e) && step[LANE(me, p, CHUNKS - 1, e)] >= (e))
#define ALL(step, me, e) (ALL_CHUNKS(step, me, 0, e) && ALL_CHUNKS(step, me, 1, e) && \
                          ALL_CHUNKS(step, me, RANKS - 1, e))

#if DISPATCH_PER_PEER
#define MAY_DISPATCH(me, peer, e) ((e) <= OPEN || ALL_CHUNKS(finished, me, peer, (e) - OPEN))
#elif OPEN == 1
#define MAY_DISPATCH(me, peer, e) ((e) == 1 || ALL(finished, me, (e) - 1))
#else
#define MAY_DISPATCH(me, peer, e) ((e) == 1 || (ALL(dispatched, me, (e) - 1) && \
                                   ((e) <= OPEN || ALL(finished, me, (e) - OPEN))))
#endif

#if COMBINE_BEFORE_READ
#define MAY_COMBINE(me, peer, e) ALL(arrived, me, e)
#elif COMBINE_PER_SOURCE
#define MAY_COMBINE(me, peer, e) ALL_CHUNKS(was_read, me, peer, e)
#else
#define MAY_COMBINE(me, peer, e) ALL(was_read, me, e)
#endif

/* Wait for one flag; the count it carries goes to `count`. A flag of a later exchange is an error at once. */
#define FLAG(kind, src, dst, flag_chunk, e) flag_epoch[MSG(kind, src, dst, flag_chunk, e)]
inline accept_flag(kind, src, dst, flag_chunk, e, count) {
  m = MSG(kind, src, dst, flag_chunk, e);
  stale_flag_accepted = (flag_epoch[m] != (e)); assert(!stale_flag_accepted);
  count = flag_count[m];
  if :: !FIRST_CHUNK_ONLY -> flag_count[m] = 0 :: else fi;
  m = 0
}
#define REFUSE_AHEAD(kind, src, dst, flag_chunk, e) \
  :: d_step { FLAG(kind, src, dst, flag_chunk, e) > (e) -> flag_ahead = 1; assert(!flag_ahead) }

#define FLAG_CHUNK (FIRST_CHUNK_ONLY -> 0 : chunk)
#define I_CLOSE    closes[me * OPEN + e % OPEN]

/* Store the combine: one row back for each row received, or CLOSED without rows. */
inline send_combine() {
  if
  :: I_CLOSE -> store_flag(COMBINE, me, peer, chunk, e, CLOSED)
  :: else ->
     store_rows(COMBINE, me, peer, chunk, e, received);
     store_flag(COMBINE, me, peer, chunk, e, received)
  fi
}

/* Go to the lane's next exchange; with CHUNKS_FOLLOW_T a lane may have none in an exchange. */
inline next_exchange() {
  finished[LANE(me, peer, chunk, e)] = e; e = e + OPEN; sent = 0; received = 0; count = 0;
  skip_missing_chunks()
}
inline skip_missing_chunks() {
  do
  :: e <= EXCHANGES && chunk >= CHUNKS_IN(e) ->
     dispatched[LANE(me, peer, chunk, e)] = e; arrived[LANE(me, peer, chunk, e)] = e;
     was_read[LANE(me, peer, chunk, e)] = e; finished[LANE(me, peer, chunk, e)] = e; e = e + OPEN
  :: else -> break
  od
}

proctype Lane(byte me, peer, chunk, first) {
  byte e = first;              /* epoch of the exchange */
  byte sent;                   /* live tokens of my dispatch to this peer */
  byte received;               /* live tokens of the peer's dispatch to me */
  byte count;                  /* count of the peer's combine flag */
  byte m, k;

  d_step { skip_missing_chunks(); m = 0 }
  do
  :: e > EXCHANGES -> break

  :: atomic { e <= EXCHANGES && MAY_DISPATCH(me, peer, e) ->                     /* dispatch, send */
       sent = (1 << TOKENS(chunk, e)) - 1;
       if
       :: LIVE && me != peer -> if :: sent = 0 :: sent = sent & 1 :: sent = sent & 2 :: skip fi
       :: else
       fi;
       if   /* the choice of the rank, made once, by its first lane */
       :: CLOSE && peer == 0 && chunk == 0 -> if :: I_CLOSE = 1 :: I_CLOSE = 0 fi
       :: else
       fi;
       d_step {
         store_rows(DISPATCH, me, peer, chunk, e, sent);
         if
         :: EMPTY_CHUNK_SILENT && sent == 0
         :: else -> store_flag(DISPATCH, me, peer, chunk, e, sent)
         fi;
         dispatched[LANE(me, peer, chunk, e)] = e } };

     if                                                                   /* dispatch, receive: the flag */
     :: d_step { !(CLOSE_UNSEEN && I_CLOSE) && ACCEPT(FLAG(DISPATCH, peer, me, FLAG_CHUNK, e), e) ->
          accept_flag(DISPATCH, peer, me, FLAG_CHUNK, e, received); arrived[LANE(me, peer, chunk, e)] = e;
#if READ_AT_ONCE
          take_rows(DISPATCH, peer, me, chunk, e, received, !I_CLOSE); was_read[LANE(me, peer, chunk, e)] = e;
#endif
        }
     REFUSE_AHEAD(DISPATCH, peer, me, FLAG_CHUNK, e)
#if CLOSE_UNSEEN
     :: d_step { I_CLOSE -> arrived[LANE(me, peer, chunk, e)] = e }
#endif
     fi;
#if COMBINE_BEFORE_READ
     d_step { MAY_COMBINE(me, peer, e) -> send_combine() };
#endif
#if !READ_AT_ONCE
     d_step { take_rows(DISPATCH, peer, me, chunk, e, received, !I_CLOSE);  /* dispatch, receive: the rows */
              was_read[LANE(me, peer, chunk, e)] = e };
#endif
#if SKIP
     if
     :: atomic { skipped[e] -> next_exchange(); m = 0; goto next }
     :: atomic { !skipped[e] && MAY_COMBINE(me, peer, e) -> send_combine() }
     fi;
#elif !COMBINE_BEFORE_READ
     d_step { MAY_COMBINE(me, peer, e) -> send_combine() };                       /* combine, send */
#endif
     if                                                                           /* combine, receive */
     :: d_step { ACCEPT(FLAG(COMBINE, peer, me, FLAG_CHUNK, e), e) ->
          accept_flag(COMBINE, peer, me, FLAG_CHUNK, e, count);
          if
          :: count == CLOSED && !I_CLOSE && !CLOSED_AS_ZERO -> skip       /* an error is raised here */
          :: else ->
             if :: count == CLOSED -> count = 0 :: else fi;
             take_rows(COMBINE, peer, me, chunk, e, count, !I_CLOSE);
             result_incomplete = (!I_CLOSE && count != sent); assert(!result_incomplete)
          fi;
          next_exchange(); m = 0 }
     REFUSE_AHEAD(COMBINE, peer, me, FLAG_CHUNK, e)
     fi;
next: skip
  od
}

init {
  byte i, j, c, d, b;
  atomic {
    for (i : 1 .. EXCHANGES) {
      T_of[i] = T_MAX;
      if
      :: T_MOVES == 1 && T_MAX > 1 -> if :: T_of[i] = 1 :: skip fi
      :: T_MOVES == 2 && i % 2 == 0 -> T_of[i] = 1
      :: else
      fi;
      if :: SKIP -> if :: skipped[i] = 1 :: skip fi :: else fi
    }
    start_wires(i, j, d, c, b);
    for (i : 0 .. RANKS - 1) {
      for (j : 0 .. RANKS - 1) {
        for (c : 0 .. CHUNKS - 1) {
          for (b : 1 .. OPEN) { run Lane(i, j, c, b) }
        }
      }
    }
    i = 0; j = 0; c = 0; d = 0; b = 0
  }
}
