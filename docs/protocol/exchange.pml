/* The protocol of ../protocol.md: processes that exchange CALLS times through windows of two
 * halves. `make protocol` has spin go through everything that can happen.
 *
 * Time: in a patient run a wait expires only once a process has stopped or given up, so that
 * processes that wait for each other show up as a deadlock. Those that are faulty may stop for
 * ever before any step, or give up as their ranks do not come. In an impatient run each process
 * may give up in any wait, however late or early the others are. Stopping would add nothing there:
 * it is being late for ever.
 *
 * Memory order: a process is sure of what another has done up to the step that it has learnt of,
 * by an acquiring load of a flag that the other released after that step. Of what came later it
 * sees flags, but all else as it was before. To overwrite what is not known to have been read is a
 * data race.
 *
 * Mistakes to find, by -D:
 *   RELAXED=<flag>  this flag's store or loads do not order what is around them
 *   HALVES=1        a half is reused one call early; right again with REUSE=1, which waits for it
 *   NO_LEADER       each process takes the call that came first there; right again with ORDERED,
 *                   where calls come together in one order in all processes by themselves
 *   UNBOUNDED       no wait expires
 *   SILENT          a process that gives up does not say so
 *   HIDDEN          one that gives up before it has shown its words says so in words nobody finds
 */

#ifndef PROCESSES
#define PROCESSES 2
#endif
#ifndef HALVES
#define HALVES 2
#endif
#ifndef REUSE
#define REUSE 2
#endif
#define CALLS 3
#define CELLS 2 /* of a half: rows and print, written and read one after the other */

/* The flags. */
#define NONE 0
#define KEY 1
#define ANNOUNCED 2
#define PUBLISHED 3
#define FINISHED 4
#ifndef RELAXED
#define RELAXED NONE
#endif

/* A process's steps, in their order. */
#define OPENED 1
#define NAMED(epoch) (3 * (epoch) + 1)
#define FILLED(epoch) (3 * (epoch) + 2)
#define PULLED(epoch) (3 * (epoch) + 3)

#define HALF(epoch) ((epoch) % HALVES)
#define BEFORE(written) ((written) > HALVES -> (written) - HALVES : 0)

/* What processes share. Memory is zeros first. */
bit key[PROCESSES], files[PROCESSES];
byte announced, name[HALVES];
byte published[PROCESSES], finished[PROCESSES], gave_up[PROCESSES];
byte window[PROCESSES * HALVES * CELLS]; /* the epochs in which the cells were written */

/* What is known of a run, and decides what may happen. */
bit patient, faulty[PROCESSES], stopped[PROCESSES];
byte step_known[PROCESSES * PROCESSES]; /* by who knows, and of whom */
byte call_of[CALLS + 1];                /* by epoch */

#define CELL(process, epoch, cell) window[((process) * HALVES + HALF(epoch)) * CELLS + (cell)]
#define KNOWN(of) step_known[me * PROCESSES + (of)]

/* Words can be read by those who find them. */
#define TELLS(process) (key[process] && gave_up[process])

/* Calls 1 and 2 come together in any order, call 3 after call 1. */
#ifdef ORDERED
#define READY(call) ((call) == epoch)
#else
#define READY(call) (!(done & (1 << (call))) && ((call) != 3 || (done & 2)))
#endif

#if PROCESSES == 2
#define ANY(words) (words[0] || words[1])
#define ANY_TELLS (TELLS(0) || TELLS(1))
#define ALL_OTHERS_KNOWN(step) ((me == 0 || KNOWN(0) >= (step)) && (me == 1 || KNOWN(1) >= (step)))
#elif PROCESSES == 3
#define ANY(words) (words[0] || words[1] || words[2])
#define ANY_TELLS (TELLS(0) || TELLS(1) || TELLS(2))
#define ALL_OTHERS_KNOWN(step) \
  ((me == 0 || KNOWN(0) >= (step)) && (me == 1 || KNOWN(1) >= (step)) && \
   (me == 2 || KNOWN(2) >= (step)))
#endif

#ifdef UNBOUNDED
#define EXPIRED(other) false
#else
#define EXPIRED(other) (!patient || stopped[other] || ANY_TELLS)
#endif

/* One step. */
#define STEP(access) \
  if \
  :: atomic { access } \
  :: atomic { faulty[me] -> stopped[me] = true; goto end } \
  fi

/* Learns that `other` has gone up to a step, from a flag that it stored after it. */
inline Learn(other, flag, step) {
  if
  :: flag != RELAXED && KNOWN(other) < (step) -> KNOWN(other) = step
  :: else
  fi
}

/* A wait for `other`. What has happened counts, even if somebody has given up since. */
#define AWAIT(other, condition, flag, step) \
  if \
  :: atomic { condition -> Learn(other, flag, step) } \
  :: atomic { !(condition) && EXPIRED(other) -> goto give_up } \
  :: atomic { faulty[me] -> stopped[me] = true; goto end } \
  fi

/* The ranks of this process come to their next call, or they do not. */
#define RANKS_COME \
  if \
  :: true \
  :: atomic { !patient || faulty[me] -> goto give_up } \
  fi

#define FOR_OTHERS(body) \
  other = (me == 0 -> 1 : 0); \
  do \
  :: other < PROCESSES -> \
    body; \
    other = (other + 1 == me -> other + 2 : other + 1) \
  :: else -> other = 0; break \
  od

proctype Process(byte me) {
  byte epoch, call, done, other, cell, seen;

  RANKS_COME;
  STEP(files[me] = 1);
  STEP(key[me] = 1);
  FOR_OTHERS(
    AWAIT(other, key[other], KEY, OPENED);
    STEP(seen = (KNOWN(other) >= OPENED -> files[other] : 0); assert(seen == 1); seen = 0)
  );

  do
  :: epoch < CALLS ->
    epoch++;
    RANKS_COME;
#ifdef NO_LEADER
    STEP(if :: READY(1) -> call = 1 :: READY(2) -> call = 2 :: READY(3) -> call = 3 fi);
#else
    if
    :: me == 0 ->
      STEP(
        if :: READY(1) -> call = 1 :: READY(2) -> call = 2 :: READY(3) -> call = 3 fi;
        assert(epoch <= HALVES || ALL_OTHERS_KNOWN(NAMED(epoch - HALVES)));
        name[HALF(epoch)] = call
      );
      STEP(announced = epoch)
    :: else ->
      AWAIT(0, announced >= epoch, ANNOUNCED, NAMED(epoch));
      STEP(call = (KNOWN(0) >= NAMED(epoch) -> name[HALF(epoch)] : 0); assert(call != 0));
      assert(READY(call))
    fi;
#endif
    RANKS_COME;
    d_step {
      assert(call_of[epoch] == 0 || call_of[epoch] == call);
      call_of[epoch] = call
    }

#if HALVES == 2
    d_step { FOR_OTHERS(assert(finished[other] + REUSE >= epoch)) }; /* nothing to wait for */
#else
    if
    :: epoch > HALVES ->
      FOR_OTHERS(AWAIT(other, finished[other] + REUSE >= epoch, FINISHED, PULLED(epoch - REUSE)))
    :: else
    fi;
#endif
    do
    :: cell < CELLS ->
      STEP(
        assert(epoch <= HALVES || ALL_OTHERS_KNOWN(PULLED(epoch - HALVES)));
        CELL(me, epoch, cell) = epoch;
        cell++
      )
    :: else -> cell = 0; break
    od;
    STEP(published[me] = epoch);

    FOR_OTHERS(AWAIT(other, published[other] >= epoch, PUBLISHED, FILLED(epoch)));
    FOR_OTHERS(
      do
      :: cell < CELLS ->
        STEP(
          seen = CELL(other, epoch, cell);
          seen = (KNOWN(other) >= FILLED(epoch) -> seen : BEFORE(seen));
          assert(seen == epoch);
          seen = 0;
          cell++
        )
      :: else -> cell = 0; break
      od
    );
    STEP(finished[me] = epoch);
    done = done | (1 << call);
    call = 0
  :: else -> break
  od;
  goto end;

give_up:
  assert(!patient || faulty[me] || ANY(stopped) || ANY(gave_up));
#ifndef SILENT
#ifndef HIDDEN
  if
  :: !key[me] -> STEP(files[me] = 1); STEP(key[me] = 1)
  :: else
  fi;
#endif
  STEP(gave_up[me] = (epoch > 0 -> epoch : 1));
#endif

end:
  faulty[me] = false
}

init {
  byte process;
  if
  :: patient = true;
    do
    :: process < PROCESSES -> faulty[process] = true; process++
    :: process < PROCESSES -> process++
    :: else -> process = 0; break
    od
  :: patient = false
  fi;
  atomic {
    do
    :: process < PROCESSES -> run Process(process); process++
    :: else -> break
    od
  }
}
