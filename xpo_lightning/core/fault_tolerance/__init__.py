"""Stops a run before harm is done, on all processes together.

A process that fails alone must not leave the others waiting for it. Three rules see to that:

1. Work without communication (rollouts, rewards, validation, checking that a loss is finite) runs under the `Guard`.
   Afterwards all processes report success or failure, and the error of one becomes an error of all. They stay in step,
   so that they can skip a step, or save, together.
2. A process that fails anywhere else (in a forward or backward pass with collectives, in saving, in a callback) says so
   on the `Lifeline`, a connection separate from torch's. The others may be blocked in a collective that cannot be
   interrupted, so they do not continue: after a few seconds in which they may exit by themselves, they are ended with
   the exit status of the failed process.
3. A process that is gone sends nothing, but its end of the lifeline closes with it, and the others end at once.

The process that failed first reports its error. Errors that this causes in other processes are not shown.
"""
