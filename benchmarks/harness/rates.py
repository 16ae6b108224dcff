"""What a device can do, for floors: bytes read per second."""

import time

import torch


def wait(device: torch.device) -> None:
    """Until the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bandwidth(device: torch.device, rounds: int = 3) -> float:
    """Bytes read per second: the best of some rounds over 512 MiB, which no cache holds."""
    block = torch.ones(2**27, device=device)
    found = []
    for _ in range(rounds):
        wait(device)
        started = time.perf_counter()
        block.sum()
        wait(device)
        found.append(block.numel() * 4 / (time.perf_counter() - started))
    return max(found)
