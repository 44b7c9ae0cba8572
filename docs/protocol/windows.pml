/* Windows, flags and the wires between ranks. Included by exchange.pml and failure.pml.
 *
 * Memory is weaker here than any machine we know. What a rank has stored is "under way" and lands when it
 * likes: rows and flags of one (source, destination) pair in any order, except that a flag lands after the
 * rows which that flag covers. Nothing else is ordered: not two flags, not the two windows, not two
 * destinations. A store that lands late stands for a slow sender too, so a rank may store all rows and
 * flags of one kind in a single step.
 *
 * Two things are bookkeeping of the model and not of the library; they keep the number of states small: a
 * slot becomes FREE when its row has been read or dropped, and a flag forgets its count when it is
 * accepted. No rank looks at either again before the next store, so nothing that can happen gets lost.
 */
#define DISPATCH 0
#define COMBINE  1
#define FREE     0                       /* slot: holds no row that somebody will still read */
#define CLOSED   255                     /* count of a closing flag without data (0xFFFF in the code) */

#ifndef BANKS
#define BANKS 1                          /* banks of each window */
#endif
#ifndef FLAG_BEFORE_ROWS
#define FLAG_BEFORE_ROWS 0               /* control: the flag does not wait for its rows */
#endif
#ifndef ROWS_AT_ONCE
#define ROWS_AT_ONCE 0                   /* smaller search: rows land when stored, only flags are late. This
                                            is the worst case for "overwritten before it was read" */
#endif
#ifndef SAME_PLACE_IN_ORDER
#define SAME_PLACE_IN_ORDER 0            /* kinder memory: stores of one rank to one place land in order, so a
                                            newer flag replaces an older one under way; with ROWS_AT_ONCE */
#endif

/* Tokens of a source are split over its chunks. Their number is fixed: with a small T one may be empty. */
#if CHUNKS_FOLLOW_T
#define CHUNKS_IN(e)     (CHUNKS - (T_of[e] < CHUNKS))     /* CHUNKS is 1 or 2 */
#else
#define CHUNKS_IN(e)     CHUNKS
#endif
#define BEGIN(chunk, e)  (T_of[e] * (chunk) / CHUNKS_IN(e))
#define TOKENS(chunk, e) (BEGIN((chunk) + 1, e) - BEGIN(chunk, e))
#define TOKENS_MAX       ((T_MAX + CHUNKS - 1) / CHUNKS)   /* 1 or 2 */

/* one message: what src stores for dst in one chunk of an exchange: some rows and the flag over them */
#define MSG(kind, src, dst, chunk, e) \
  (((((kind) * RANKS + (src)) * RANKS + (dst)) * CHUNKS + (chunk)) * BANKS + (e) % BANKS)
#define MSGS (2 * RANKS * RANKS * CHUNKS * BANKS)

/* one slot in the window of dst. Dispatched rows are one tensor [world * T, ...]: slot = source * T + token,
 * with T of exchange e. Combined rows are never handed out as a tensor, their slot does not depend on T. */
#ifndef COMBINE_MOVES
#define COMBINE_MOVES 0                  /* what if: combine slots move with T too */
#endif
#if COMBINE_MOVES
#define PLACES(kind, e) T_of[e]
#else
#define PLACES(kind, e) (((kind) == DISPATCH) * T_of[e] + ((kind) == COMBINE) * T_MAX)
#endif
#define SLOT(kind, src, dst, token, e) \
  ((((kind) * RANKS + (dst)) * BANKS + (e) % BANKS) * RANKS * T_MAX + (src) * PLACES(kind, e) + (token))
#define SLOTS (2 * RANKS * BANKS * RANKS * T_MAX)

/* what a row holds: who wrote it, for which token, in which exchange */
#define ROW(src, token, e) (((e) * RANKS + (src)) * T_MAX + (token) + 1)

byte T_of[EXCHANGES + 2];                /* T of each exchange, equal on all ranks */

byte window[SLOTS];                      /* dispatch_window and combine_window of every rank */
byte flag_epoch[MSGS], flag_count[MSGS]; /* dispatch_flag and combine_flag: epoch << 16 | count. The
                                            model's count is the set of live tokens (bit i: token i of the
                                            chunk), or CLOSED */
byte way_epoch[MSGS], way_count[MSGS];   /* the flag under way (epoch 0: none) */
byte way_rows[MSGS], way_row_epoch[MSGS];/* the rows under way (bit i: token i of the chunk) */
byte under_way;                          /* rows and flags under way, all together */

/* what must hold; each is a name so that the checker says which one was violated */
bit row_overwritten;                     /* a row landed on a row that was not read yet */
bit row_missing;                         /* a reader found something else than the row it was promised */
bit two_writes_under_way;                /* a place is stored to while an older store to it is under way */
bit stale_flag_accepted;                 /* a flag of another exchange was taken for this one's */
bit flag_ahead;                          /* a waiting rank saw a flag of a later exchange */

#ifndef NOBODY_READS
#define NOBODY_READS(src, dst, e) 0      /* dst has given this exchange up, or masks src */
#endif
inline land_row(kind, src, dst, token, e) {
  row_overwritten = (window[SLOT(kind, src, dst, token, e)] != FREE); assert(!row_overwritten);
  if
  :: NOBODY_READS(src, dst, e)
  :: else -> window[SLOT(kind, src, dst, token, e)] = ROW(src, token, e)
  fi
}

/* Store the rows of one chunk and then its flag. `rows`: bit i is token BEGIN(chunk) + i. A rank's stores to
 * its own memory land at once. `m` and `k` are scratch variables of the caller. */
inline store_rows(kind, src, dst, chunk, e, rows) {
  m = MSG(kind, src, dst, chunk, e);
  two_writes_under_way = (way_rows[m] != 0); assert(!two_writes_under_way);
  if
  :: src == dst || ROWS_AT_ONCE ->
     k = 0;
     do
     :: k < TOKENS_MAX ->
        if
        :: ((rows) >> k) & 1 -> land_row(kind, src, dst, BEGIN(chunk, e) + k, e)
        :: else
        fi;
        k++
     :: else -> break
     od
  :: else ->
     way_rows[m] = (rows); way_row_epoch[m] = ((rows) -> (e) : 0);
     under_way = under_way + ((rows) & 1) + (((rows) >> 1) & 1)
  fi;
  m = 0; k = 0
}
inline store_flag(kind, src, dst, chunk, e, count) {
  m = MSG(kind, src, dst, chunk, e);
  two_writes_under_way = (!SAME_PLACE_IN_ORDER && way_epoch[m] != 0); assert(!two_writes_under_way);
  if
  :: src == dst -> flag_epoch[m] = (e); flag_count[m] = (count)
  :: else       -> under_way = under_way + (way_epoch[m] == 0); way_epoch[m] = (e); way_count[m] = (count)
  fi;
  m = 0
}

/* One wire for each message place. It delivers when it likes, rows in any order, the flag after its rows. */
#define WIRE_ROW(i) \
  :: d_step { (way_rows[m] >> i) & 1 -> \
       land_row(kind, src, dst, BEGIN(chunk, way_row_epoch[m]) + i, way_row_epoch[m]); \
       way_rows[m] = way_rows[m] & ~(1 << i); under_way--; \
       if :: way_rows[m] == 0 -> way_row_epoch[m] = 0 :: else fi }

proctype Wire(byte kind, src, dst, chunk, bank) {
  byte m = MSG(kind, src, dst, chunk, bank);
end:
  do
  WIRE_ROW(0)
  WIRE_ROW(1)
  :: d_step { way_epoch[m] && (FLAG_BEFORE_ROWS || way_rows[m] == 0) ->
       flag_epoch[m] = way_epoch[m]; flag_count[m] = way_count[m];
       way_epoch[m] = 0; way_count[m] = 0; under_way-- }
  od
}

/* Read (check = 1) or drop (check = 0) the rows of one chunk; either way nobody needs them afterwards. */
inline take_rows(kind, src, dst, chunk, e, rows, check) {
  k = 0;
  do
  :: k < TOKENS_MAX ->
     if
     :: ((rows) >> k) & 1 ->
        m = SLOT(kind, src, dst, BEGIN(chunk, e) + k, e);
        row_missing = ((check) && window[m] != ROW(src, BEGIN(chunk, e) + k, e)); assert(!row_missing);
        window[m] = FREE
     :: else
     fi;
     k++
  :: else -> break
  od;
  m = 0; k = 0
}

inline start_wires(n_kind, n_src, n_dst, n_chunk, n_bank) {
  for (n_kind : 0 .. 1) {
    for (n_src : 0 .. RANKS - 1) {
      for (n_dst : 0 .. RANKS - 1) {
        for (n_chunk : 0 .. CHUNKS - 1) {
          for (n_bank : 0 .. BANKS - 1) {
            if
            :: n_src != n_dst -> run Wire(n_kind, n_src, n_dst, n_chunk, n_bank)
            :: else
            fi
          }
        }
      }
    }
  }
}
