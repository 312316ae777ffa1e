"""Stops a run before harm is done, on all processes together.

A process that fails alone must not leave the others waiting for it. Three rules see to that:

1. Work that talks to no other process (rollouts, rewards, validation, looking whether a loss is finite) is given to the
   `Guard`. When it is done, all processes tell how they fared, and the error of one becomes an error of all. They stay
   in step, so that they can leave a step out, or save together.
2. A process that fails anywhere else (in a forward or backward pass with collectives in it, in saving, in a callback)
   says so on the `Lifeline`, a connection beside those of torch. The others may be blocked in a collective that cannot
   be broken off, so they do not go on: they end as they are, with the exit status of the one that failed, once they
   have had a few seconds to end by themselves.
3. A process that is gone says nothing, but its end of the lifeline closes with it, and the others end at once.

The process that failed first is the one that speaks. What the others run into because of it is not shown.
"""
