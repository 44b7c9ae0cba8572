/* Blocks that spin keep their multiprocessor. Two ranks; COMMUNICATORS are started in any order on different
 * streams; an exchange is one kernel of BLOCKS blocks on each rank; RESIDENT blocks fit on a GPU at once. A
 * block sends, then waits until all blocks of the peer's kernel (same communicator) have sent. TICKET 1: of
 * the blocks of a kernel only the one that finishes sending last waits. Fails by deadlock.
 */
#ifndef COMMUNICATORS
#define COMMUNICATORS 1
#endif
#ifndef BLOCKS
#define BLOCKS 2
#endif
#ifndef RESIDENT
#define RESIDENT 2
#endif
#ifndef TICKET
#define TICKET 0
#endif

byte resident[2];
byte sent[2 * COMMUNICATORS];

proctype Block(byte me, c) {
  byte ticket;
  d_step { resident[me] < RESIDENT -> resident[me]++ }
  d_step { sent[me * COMMUNICATORS + c]++; ticket = sent[me * COMMUNICATORS + c] }
  if
  :: TICKET && ticket < BLOCKS -> skip
  :: else -> sent[(1 - me) * COMMUNICATORS + c] == BLOCKS
  fi;
  resident[me]--
}

init {
  byte me, c, b;
  atomic {
    for (me : 0 .. 1) {
      for (c : 0 .. COMMUNICATORS - 1) {
        for (b : 1 .. BLOCKS) { run Block(me, c) }
      }
    }
  }
}
