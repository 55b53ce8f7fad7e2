"""The frozen policy that the KL divergence is measured to."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from axpo.reference import Reference, in_host


def test_it_stays_as_the_policy_was_and_lies_in_the_hosts_memory_between_its_forwards(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    ids = torch.arange(20)[None]
    for offload in (False, True):
        policy = make_model()
        reference = Reference(policy, offload)
        with torch.no_grad():
            before = policy(input_ids=ids).logits
            for parameter in policy.parameters():
                parameter.mul_(1.1)
            assert not torch.equal(policy(input_ids=ids).logits, before)
            for _ in range(2):
                with reference.present() as model:
                    assert torch.equal(model(input_ids=ids).logits, before)
        assert not any(parameter.requires_grad for parameter in reference.model.parameters())
        assert len(reference.host) == (len(list(policy.parameters())) if offload else 0)
        assert all(parameter.data_ptr() == kept.data_ptr() for parameter, kept in reference.host.items())


def test_a_copy_in_the_host_may_be_wider() -> None:
    weight = torch.tensor([0.1, 2.0], dtype=torch.bfloat16, requires_grad=True)
    copy = in_host(weight, torch.float32)
    assert copy.tolist() == [0.10009765625, 2.0]
    assert (copy.dtype, copy.requires_grad) == (torch.float32, False)
    assert in_host(weight).dtype == torch.bfloat16
    assert in_host(weight).data_ptr() != weight.data_ptr()
