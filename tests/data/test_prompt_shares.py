"""The order of prompts in each of several processes, also where a resumed run goes on within an epoch."""

import pytest

from xpo_lightning.data.sampler import PromptOrder


def order(rank: int, processes: int, skipped: int = 0, shuffle: bool = True, epoch: int = 3) -> list[int]:
    share = PromptOrder(range(11), num_replicas=processes, rank=rank, shuffle=shuffle, seed=5)
    share.set_epoch(epoch)
    share.skipped = skipped
    return list(share)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_resumed_pass_goes_on_where_each_process_stopped(shuffle):
    """Of 11 prompts, two processes have 6 each, the first prompt twice; 4 each were used before."""
    whole = order(0, 1, shuffle=shuffle)
    assert sorted(whole) == list(range(11))
    shares = [order(rank, 2, shuffle=shuffle) for rank in (0, 1)]
    assert shares == [whole[::2], [*whole[1::2], whole[0]]]
    assert [order(rank, 2, skipped=4, shuffle=shuffle) for rank in (0, 1)] == [share[4:] for share in shares]
    assert order(1, 2, skipped=6, shuffle=shuffle) == []
