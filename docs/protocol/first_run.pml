/* How ranks agree on a call, ../protocol.md: two processes run a program RUNS times, and either may
 * compile it again before any run. CALLS calls of one kind stand in it, one after the other.
 *
 * A wait expires only when nothing else can happen (`timeout`), or, before a process has met the
 * other, at any time in an impatient run. XLA's all-gather never expires: if it waited for nobody,
 * that would be an invalid end state.
 *
 * Mistakes to find, by -D:
 *   ONE_STAGE   who has seen the other begin goes on, though that one may give up
 *   RUN_IDS     executions are named by XLA's numbers of runs, which differ between processes
 */

#ifndef CALLS
#define CALLS 1
#endif
#define RUNS 3
#define MAX_NAMES 7 /* each compilation of process 0 may give its calls new numbers, from 1 */

#define AT(now, call) ((now) * CALLS + (call) + 1)
#define NAME(number, execution) ((number) * 16 + (execution))
#ifdef RUN_IDS
#define EXECUTION(number) (now + 3 * me) /* as XLA counts */
#else
#define EXECUTION(number) (now - first_run[me * MAX_NAMES + (number)])
#endif

byte begun[2], met[2], came_to[2];
byte gathered[2], gathering_at[2]; /* how often each has entered the all-gather, and where */
byte said;                         /* there: process 0's number for the call */
byte exchanges[2], exchanged[2];   /* how many each has begun, and the name of the last */
byte exchanging_at[2];
bit gave_up[2], patient;
byte first_run[2 * MAX_NAMES]; /* by number, of calls that a process has agreed on; 0: none */
byte names;

/* The number of a call that the other is in, in the very execution that is to begin here. */
inline Recognise() {
  d_step {
    found = 0;
    candidates = 0;
    i = 1;
    do
    :: i < MAX_NAMES ->
       if
       :: first_run[me * MAX_NAMES + i] != 0 &&
          first_run[me * MAX_NAMES + i] != now &&
          came_to[other] == NAME(i, EXECUTION(i)) -> found = i
       :: else
       fi;
       j = i + 1;
       do
       :: j < MAX_NAMES ->
          candidates = candidates + (first_run[me * MAX_NAMES + i] != 0 &&
             first_run[me * MAX_NAMES + i] == first_run[me * MAX_NAMES + j]);
          j++
       :: else -> break
       od;
       i++
    :: else -> break
    od;
    if
    :: candidates > 0 -> found = 0
    :: else
    fi;
    i = 0;
    j = 0;
    candidates = 0
  }
}

proctype Process(byte me) {
  byte other = 1 - me, now = 1, call, turn, found, seen, candidates, i, j;
  byte number[CALLS]; /* of this compilation's calls; 0: not agreed on */

  do
  :: now > RUNS -> break
  :: else ->
     if
     :: d_step {
          number[0] = 0;
#if CALLS > 1
          number[1] = 0;
#endif
        }
     :: skip
     fi;
     call = 0;
     do
     :: call == CALLS -> break
     :: else ->
        if
        :: number[call] != 0 -> goto exchange
        :: else
        fi;
        atomic { begun[me]++; turn = begun[me] }
  look:
        atomic { seen = came_to[other]; Recognise() }
        if
        :: atomic { begun[other] >= turn -> met[me]++ }
#if CALLS == 1 /* which of two it is cannot be known */
        :: atomic { begun[other] < turn && found != 0 -> number[call] = found }
           begun[me]--;
           goto exchange
#endif
        :: begun[other] < turn && (!patient || (found == 0 && timeout)) -> goto begin_nothing
        :: begun[other] < turn && found == 0 && came_to[other] != seen -> goto look
        fi;
#ifndef ONE_STAGE
        if
        :: met[other] >= turn
        :: met[other] < turn && begun[other] < turn -> met[me]--; goto begin_nothing
        fi;
#endif
        /* XLA's all-gather. */
        atomic {
          if
          :: me == 0 -> names++; said = names
          :: else
          fi;
          gathered[me]++;
          gathering_at[me] = AT(now, call)
        }
        atomic {
          gathered[other] >= gathered[me];
          assert(gathered[other] > gathered[me] || gathering_at[other] == gathering_at[me]);
          number[call] = said;
          first_run[me * MAX_NAMES + said] = now
        }
  exchange:
        atomic {
          came_to[me] = NAME(number[call], EXECUTION(number[call]));
          exchanges[me]++;
          exchanged[me] = came_to[me];
          exchanging_at[me] = AT(now, call)
        }
        if
        :: atomic {
             exchanges[other] == exchanges[me] && exchanged[other] == exchanged[me] ->
             assert(exchanging_at[other] == exchanging_at[me])
           }
        :: exchanges[other] > exchanges[me]
        :: gave_up[other] || timeout -> goto give_up
        fi;
        call++
     od;
     now++
  od;
  goto end;
begin_nothing:
  begun[me]--;
give_up:
  assert(CALLS > 1 || !patient); /* a call compiled again is recognised */
  gave_up[me] = true;
end:
  skip
}

init {
  atomic {
    if
    :: patient = true
    :: patient = false
    fi;
    run Process(0);
    run Process(1)
  }
}
