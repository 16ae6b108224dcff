"""Residual shards as files, in the run's own directory and in a cache that runs share.

A file is used only if its checksum is right and it was written for the same content key.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow

from ray_abliterate.data.atomic_files import cache_root, link_atomically, write_atomically
from ray_abliterate.directions.residuals.shard import DamagedShard, ResidualShard
from ray_abliterate.recipe import RunSettings


@dataclass(frozen=True)
class ShardFolder:
    """A folder of shards, in files `<set>-<number>.arrow`."""

    path: Path

    def file(self, name: str, number: int) -> Path:
        """Return the path of a shard, whether or not it is there."""
        return self.path / f"{name}-{number:05d}.arrow"

    def read(self, name: str, number: int, key: str) -> ResidualShard | None:
        """Read a shard; return None if there is none for this key.

        Raises:
            DamagedShard: the file is not the one that was written.
        """
        file = self.file(name, number)
        return ResidualShard.from_file(file.read_bytes(), key) if file.exists() else None

    def read_all(self, name: str) -> Iterator[ResidualShard]:
        """Yield every shard of a set, whatever its key.

        Raises:
            DamagedShard: a file is not the one that was written.
        """
        for file in sorted(self.path.glob(f"{name}-*.arrow")):
            shard = ResidualShard.from_file(file.read_bytes())
            assert shard is not None
            yield shard

    def map_all(self, name: str, key: str, count: int) -> Iterator[ResidualShard]:
        """Yield a set's shards memory-mapped, up to the first that is not there for this key.

        Args:
            name: The set's name.
            key: Its content key.
            count: The number of shards that the set has.

        Raises:
            DamagedShard: a file is not the one that was written; names it.
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
    """The places where a run looks for its shards, and stores them."""

    def __init__(
        self, own: ShardFolder | None, cache: Path | None, note: Callable[[str], None]
    ) -> None:
        """Look in both places, the run's own first.

        Args:
            own: The run's own folder, if it stores its shards.
            cache: The folder that runs share, if they do, with a folder for each content key.
            note: Receives notes of damaged files, and of a cache that cannot be used.
        """
        self._own = own
        self._cache = cache
        self._note = note

    @classmethod
    def of(
        cls, settings: RunSettings, own: ShardFolder, note: Callable[[str], None]
    ) -> "ShardFiles":
        """Return the places that the recipe asks for: the run's folder and the user's cache."""
        cache = cache_root() / "residuals" if settings.residual_cache else None
        return cls(own if settings.save_residuals else None, cache, note)

    @property
    def stores(self) -> bool:
        """Whether shards are stored at all."""
        return self._own is not None or self._cache is not None

    def find(self, name: str, number: int, key: str) -> ResidualShard | None:
        """Return a stored shard, and link it where it is missing; None if there is none."""
        shard, lacking = None, []
        for folder in self._folders(key):
            if shard is None:
                shard = self._read(folder, name, number, key)
                intact = folder.file(name, number)
                if shard is None:
                    lacking.append(folder)
            elif not folder.file(name, number).exists():
                lacking.append(folder)
        if shard is not None:
            for folder in lacking:
                self._link(folder, folder.file(name, number), intact)
        return shard

    def store(self, shard: ResidualShard, number: int, key: str) -> None:
        """Write a shard to every place.

        Raises:
            OSError: the run's own folder cannot be written.
        """
        first, *others = self._folders(key)
        file = first.file(shard.name, number)
        try:
            write_atomically(file, shard.to_file(key))
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
            self._note(f"{folder.file(name, number)} is damaged and is computed again: {damage}")
        except OSError as error:
            self._give_up(folder, error)
        return None

    def _link(self, folder: ShardFolder, file: Path, intact: Path) -> None:
        try:
            link_atomically(file, intact)
        except OSError as error:
            self._give_up(folder, error)

    def _give_up(self, folder: ShardFolder, error: OSError) -> None:
        """Do without the cache from now on; raise the error if the folder is the run's own."""
        if folder == self._own:
            raise error
        self._cache = None
        self._note(
            f"residuals are not shared with other runs: {folder.path} cannot be used "
            f"({error.strerror or error})"
        )
