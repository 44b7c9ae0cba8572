/* The meeting inside recover(), for ranks that have only words in each other's windows to meet through.
 * docs/protocol.md states the rule, check.py runs the cases; the names are those of document and code.
 *
 * Each rank has a meeting word in every peer's window: {epoch, HERE or AGREED}. HERE: I have stopped. AGREED:
 * I have seen that all have stopped, and this is the highest epoch that anybody proposed. A rank leaves when
 * the words of all peers say AGREED for the epoch that it says itself. Words for one place land in order.
 *
 * Between meetings ranks work: exchange n+1 begins when all ranks have begun exchange n. Any rank may fail at
 * any time (FAILURES in all). A rank in a meeting may give up (TRIES in all) and call recover() again.
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef FAILURES
#define FAILURES 2
#endif
#ifndef TRIES
#define TRIES 1
#endif
#ifndef AHEAD
#define AHEAD 1                /* exchanges of work between two failures, at most */
#endif
/* Controls: each breaks one rule. */
#ifndef LEAVE_WHEN_HERE
#define LEAVE_WHEN_HERE 0      /* a rank leaves as soon as all are here, without their AGREED */
#endif
#ifndef NO_FLOOR
#define NO_FLOOR 0             /* words of an earlier meeting count */
#endif

#define NONE   0
#define HERE   1
#define AGREED 2
#define AT(writer, reader) ((writer) * RANKS + (reader))
byte word_epoch[RANKS * RANKS], word_says[RANKS * RANKS];  /* meeting words */
byte way_epoch[RANKS * RANKS], way_says[RANKS * RANKS];    /* under way */
byte epoch[RANKS];             /* epoch of the exchange begun last */
byte first_epoch[RANKS] = 1;   /* after the last recovery; words below it are of before */
byte base[RANKS];              /* epoch at which this rank left the last meeting */
bit stopped[RANKS];
byte failed_after[RANKS];      /* the rank failed after the recovery to this epoch - 1 */
byte failures, tries, work;
bit left_too_early;            /* a rank left while another one still worked in epochs of before it */

#define COUNTS(me, p)  (NO_FLOOR || word_epoch[AT(p, me)] >= first_epoch[me])
#define IS_HERE(me, p) ((p) == me || (word_says[AT(p, me)] != NONE && COUNTS(me, p)))
#define ALL_HERE(me)   (IS_HERE(me, 0) && IS_HERE(me, 1) && IS_HERE(me, RANKS - 1))
#if LEAVE_WHEN_HERE
#define AGREES(me, p)  IS_HERE(me, p)
#else
#define AGREES(me, p)  ((p) == me || (word_says[AT(p, me)] == AGREED && word_epoch[AT(p, me)] == proposed))
#endif
#define ALL_AGREE(me)  (AGREES(me, 0) && AGREES(me, 1) && AGREES(me, RANKS - 1))
#define HIGHER(me, p)  ((p) != me && IS_HERE(me, p) && word_epoch[AT(p, me)] > proposed)
#define ANY_HIGHER(me) (HIGHER(me, 0) || HIGHER(me, 1) || HIGHER(me, RANKS - 1))
#define BEGUN(me, p)   (stopped[p] == 0 && epoch[p] >= epoch[me] && base[p] == base[me])
#define TOLD(me, p)    (failed_after[p] == base[me] + 1)
#define SAFE(p)        (stopped[p] || base[p] == proposed)

proctype Rank(byte me) {
  byte proposed, says, p;
WORK:
  do
  :: d_step { work < AHEAD * (failures + 1) && epoch[me] < base[me] + AHEAD &&
              (epoch[me] == base[me] || (BEGUN(me, 0) && BEGUN(me, 1) && BEGUN(me, RANKS - 1))) ->
       epoch[me]++; work++ }
  :: d_step { failures < FAILURES -> failures++; stopped[me] = 1; failed_after[me] = base[me] + 1 }; break
  :: d_step { TOLD(me, 0) || TOLD(me, 1) || TOLD(me, RANKS - 1) -> stopped[me] = 1 }; break   /* abort word */
  :: atomic { failures == FAILURES && !stopped[0] && !stopped[1] && !stopped[RANKS - 1] &&
              base[0] == base[1] && base[1] == base[RANKS - 1] -> goto END }
  od;

MEET: skip;
  d_step { proposed = epoch[me] + 1; says = NONE };
  do
  :: d_step { says == NONE || ANY_HIGHER(me) || (says == HERE && ALL_HERE(me)) ->
       p = 0;
       do
       :: p < RANKS -> if :: HIGHER(me, p) -> proposed = word_epoch[AT(p, me)] :: else fi; p++
       :: else -> break
       od;
       says = (ALL_HERE(me) -> AGREED : HERE);
       p = 0;
       do
       :: p < RANKS ->
          if :: p != me -> way_epoch[AT(me, p)] = proposed; way_says[AT(me, p)] = says :: else fi; p++
       :: else -> break
       od; p = 0 }
  :: d_step { says == AGREED && !ANY_HIGHER(me) && ALL_AGREE(me) ->
       left_too_early = !(SAFE(0) && SAFE(1) && SAFE(RANKS - 1)); assert(!left_too_early);
       epoch[me] = proposed; base[me] = proposed; first_epoch[me] = proposed + 1; stopped[me] = 0;
       proposed = 0; says = NONE };
     goto WORK
  :: d_step { says != NONE && tries < TRIES -> tries++; proposed = 0; says = NONE }; goto MEET  /* gave up */
  od;
END: skip
}

proctype Wire(byte m) {
end:
  do
  :: d_step { way_says[m] ->
       word_epoch[m] = way_epoch[m]; word_says[m] = way_says[m]; way_says[m] = NONE; way_epoch[m] = 0 }
  od
}

init {
  byte i, j;
  atomic {
    for (i : 0 .. RANKS - 1) {
      for (j : 0 .. RANKS - 1) { if :: i != j -> run Wire(AT(i, j)) :: else fi };
      run Rank(i)
    }
  }
}
