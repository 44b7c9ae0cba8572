/* Sums over the ranks of one machine (csrc/kernels/cpu/host_sum.h): what hosts agree on before a step.
 * docs/protocol.md states the rule, check.py runs the cases; the names are those of document and code.
 *
 * Each rank has a board with BANKS banks, each a round number and a value. In round r it writes its value into
 * bank r % BANKS of its own board and stores r there, then waits for r in that bank of every board and reads
 * the value. A value lands at once, which is the worst for a reader that is late; its round number lands when
 * it likes.
 */
#ifndef RANKS
#define RANKS 2
#endif
#ifndef ROUNDS
#define ROUNDS 5
#endif
#ifndef BANKS
#define BANKS 2
#endif
/* Control: breaks the rule. */
#ifndef ROUND_FIRST
#define ROUND_FIRST 0          /* the round number is stored before the value */
#endif

#define AT(rank) ((rank) * BANKS + round % BANKS)
byte value[RANKS * BANKS];
byte stored_round[RANKS * BANKS];
byte way[RANKS * BANKS];       /* round numbers under way */
bit wrong_value;               /* a rank read another value than that of its round */

proctype Rank(byte me) {
  byte round, p;
  do
  :: round < ROUNDS ->
     round++;
#if ROUND_FIRST
     way[AT(me)] = round;
     value[AT(me)] = round;
#else
     value[AT(me)] = round;
     way[AT(me)] = round;
#endif
     p = 0;
     do
     :: p < RANKS ->
        stored_round[AT(p)] == round;
        d_step { wrong_value = value[AT(p)] != round; assert(!wrong_value); p++ }
     :: else -> break
     od
  :: else -> break
  od
}

proctype Wire(byte place) {
end:
  do
  :: d_step { way[place] -> stored_round[place] = way[place]; way[place] = 0 }
  od
}

init {
  byte i, b;
  atomic {
    for (i : 0 .. RANKS - 1) {
      for (b : 0 .. BANKS - 1) { run Wire(i * BANKS + b) };
      run Rank(i)
    }
  }
}
