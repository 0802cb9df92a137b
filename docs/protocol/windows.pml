/* Windows of GPUs, as ../gpu_fabric.md has them: hosts put on their streams what fills a half, and
 * what reads those of others; streams take it from there, any time later. The words by which hosts
 * tell each other how far they are is exchange.pml's affair: here a word says what it should.
 *
 * Mistakes to find, by -D:
 *   HALVES=1   a half is filled again while somebody may still read it
 *   NO_READY   streams do not wait for what the others' have recorded
 *   EARLY      a host puts its reading on the stream before the others have recorded
 */

#ifndef PROCESSES
#define PROCESSES 2
#endif
#ifndef HALVES
#define HALVES 2
#endif
#ifndef CALLS
#define CALLS 4
#endif

#define HALF(process, epoch) half[(process) * HALVES + (epoch) % HALVES]

byte half[PROCESSES * HALVES]; /* the epoch that it was filled in */
byte lent[PROCESSES];          /* epochs whose filling and recording is on the stream */
byte reads[PROCESSES];         /* epochs whose waits and reading are, too */
byte ready[PROCESSES];         /* epochs that a stream has come to record */

#define FOR_OTHERS(body) \
  other = (me == 0 -> 1 : 0); \
  do \
  :: other < PROCESSES -> \
    body; \
    other = (other + 1 == me -> other + 2 : other + 1) \
  :: else -> other = 0; break \
  od

/* It never waits for a stream. */
proctype Host(byte me) {
  byte epoch, other;
  do
  :: epoch < CALLS ->
    epoch++;
    lent[me] = epoch;
#ifndef EARLY
    FOR_OTHERS(lent[other] >= epoch);
#endif
    reads[me] = epoch
  :: else -> break
  od
}

/* A wait is for what has been recorded on the host when it is put on the stream: for nothing, if
 * nothing has. */
proctype Stream(byte me) {
  byte epoch, other;
  do
  :: epoch < CALLS ->
    epoch++;
    lent[me] >= epoch;
    HALF(me, epoch) = epoch;
    ready[me] = epoch;
    reads[me] >= epoch;
#ifndef NO_READY
    FOR_OTHERS(if :: lent[other] >= epoch -> ready[other] >= epoch :: lent[other] < epoch fi);
#endif
    FOR_OTHERS(assert(HALF(other, epoch) == epoch))
  :: else -> break
  od
}

init {
  byte process;
  atomic {
    do
    :: process < PROCESSES -> run Host(process); run Stream(process); process++
    :: else -> break
    od
  }
}
