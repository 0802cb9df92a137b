/* The bell of ../protocol.md: a writer changes a word and rings; readers sleep until it has been
 * changed often enough. Here nobody looks again after a while, so a wake-up that is lost is a
 * deadlock.
 *
 * Mistakes to find, by -D:
 *   RING_FIRST   the writer rings before the change, as it could if it rang without release
 *   LOOK_FIRST   the reader looks at the word before the bell, as if it loaded that relaxed
 *   NO_COMPARE   the system puts the reader to sleep whatever the bell shows
 */

#define CHANGES 2
#define READERS 2

byte word, bell;
bit asleep[READERS];

active proctype Writer() {
  do
  :: word < CHANGES ->
#ifdef RING_FIRST
    bell++;
    d_step { asleep[0] = false; asleep[1] = false };
    word++
#else
    word++;
    bell++;
    d_step { asleep[0] = false; asleep[1] = false }
#endif
  :: else -> break
  od
}

active [READERS] proctype Reader() {
  byte me = _pid - 1, rung, seen, wanted;
  if
  :: wanted = 1
  :: wanted = CHANGES
  fi;
  do
  :: true ->
#ifdef LOOK_FIRST
    seen = word;
    rung = bell;
#else
    rung = bell;
    seen = word;
#endif
    if
    :: seen >= wanted -> break
    :: else
    fi;
    atomic {
      if
#ifdef NO_COMPARE
      :: true -> asleep[me] = true
#else
      :: bell == rung -> asleep[me] = true
      :: else
#endif
      fi
    };
    !asleep[me]
  od
}
