"""Residual shards as files: in the run's own directory, and in a cache that runs share.

A file is used only if its checksum holds and it was written for the same content key.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow

from ray_abliterate.data.atomic_files import cache_root, link_whole, write_whole
from ray_abliterate.directions.residuals.shard import DamagedShard, ResidualShard
from ray_abliterate.recipe import RunSettings


@dataclass(frozen=True)
class ShardFolder:
    """A folder of shards, `<set>-<number>.arrow`."""

    path: Path

    def file(self, name: str, number: int) -> Path:
        """Where a shard is, or would be."""
        return self.path / f"{name}-{number:05d}.arrow"

    def read(self, name: str, number: int, key: str) -> ResidualShard | None:
        """A shard; None if there is none for this key.

        Raises:
            DamagedShard: the file is not what was written.
        """
        file = self.file(name, number)
        return ResidualShard.from_file(file.read_bytes(), key) if file.exists() else None

    def all(self, name: str) -> Iterator[ResidualShard]:
        """Every shard of a set, whatever its key.

        Raises:
            DamagedShard: a file is not what was written.
        """
        for file in sorted(self.path.glob(f"{name}-*.arrow")):
            shard = ResidualShard.from_file(file.read_bytes())
            assert shard is not None
            yield shard

    def mapped(self, name: str, key: str, count: int) -> Iterator[ResidualShard]:
        """The first shards of a set that are there for a key, memory-mapped: values are not held.

        Args:
            name: The set.
            key: Its content key.
            count: How many shards there should be.

        Raises:
            DamagedShard: a file is not what was written; names it.
        """
        for number in range(count):
            file = self.file(name, number)
            if not file.exists():
                return
            try:
                data = pyarrow.memory_map(str(file)).read_buffer()
                shard = ResidualShard.from_file(data, key)
            except (DamagedShard, pyarrow.ArrowException) as damage:
                raise DamagedShard(f"{file} is damaged: {damage}") from None
            if shard is None:
                return
            yield shard


class ShardFiles:
    """Where a run looks for its shards, and keeps them."""

    def __init__(
        self, own: ShardFolder | None, cache: Path | None, note: Callable[[str], None]
    ) -> None:
        """Look in both, own first.

        Args:
            own: The run's own folder, if it keeps its shards.
            cache: The folder that runs share, if they do; it has a folder per content key.
            note: Is told about damaged files, and about a cache that cannot be used.
        """
        self._own = own
        self._cache = cache
        self._note = note

    @classmethod
    def of(
        cls, settings: RunSettings, own: ShardFolder, note: Callable[[str], None]
    ) -> "ShardFiles":
        """The places that the recipe wants, of the run's folder and the user's cache."""
        cache = cache_root() / "residuals" if settings.residual_cache else None
        return cls(own if settings.save_residuals else None, cache, note)

    @property
    def kept(self) -> bool:
        """Whether shards become files at all."""
        return self._own is not None or self._cache is not None

    def find(self, name: str, number: int, key: str) -> ResidualShard | None:
        """A shard that was kept, now in both places; None if it has to be made."""
        found, lacking = None, []
        for folder in self._folders(key):
            if found is None:
                found = self._read(folder, name, number, key)
                good = folder.file(name, number)
                if found is None:
                    lacking.append(folder)
            elif not folder.file(name, number).exists():
                lacking.append(folder)
        if found is not None:
            for folder in lacking:
                self._link(folder, folder.file(name, number), good)
        return found

    def keep(self, shard: ResidualShard, number: int, key: str) -> None:
        """Write a shard that was made.

        Raises:
            OSError: the run's own folder cannot be written.
        """
        first, *others = self._folders(key)
        file = first.file(shard.name, number)
        try:
            write_whole(file, shard.to_file(key))
        except OSError as error:
            self._give_up(first, error)
        for folder in others:
            self._link(folder, folder.file(shard.name, number), file)

    def _folders(self, key: str) -> list[ShardFolder]:
        cache = ShardFolder(self._cache / key) if self._cache else None
        return [folder for folder in (self._own, cache) if folder is not None]

    def _read(self, folder: ShardFolder, name: str, number: int, key: str) -> ResidualShard | None:
        try:
            return folder.read(name, number, key)
        except DamagedShard as damage:
            self._note(f"{folder.file(name, number)} is damaged and is made again: {damage}")
        except OSError as error:
            self._give_up(folder, error)
        return None

    def _link(self, folder: ShardFolder, file: Path, good: Path) -> None:
        try:
            link_whole(file, good)
        except OSError as error:
            self._give_up(folder, error)

    def _give_up(self, folder: ShardFolder, error: OSError) -> None:
        """Do without the cache from now on."""
        if folder == self._own:
            raise error
        self._cache = None
        self._note(
            f"residuals are not shared with other runs: {folder.path} cannot be used "
            f"({error.strerror or error})"
        )
