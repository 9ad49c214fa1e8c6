"""What all kinds of records share: where they come from, how they are checked, written and read."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from sinkstream.records.json_files import check_schema, family_of, read_json, write_json
from sinkstream.records.plain import plain_json, scrub_paths
from sinkstream.records.schema import check_environment, check_keys, field_value


@dataclass(frozen=True)
class BaseRecord:
    """A record: its file, and the fields of the JSON object in it.

    A kind of record is a class of its own. It adds fields, and states `SCHEMA` ("family/version"), `KIND` (a word for
    messages), `REQUIRED` (keys, nested as in `schema.REQUIRED`) and `NOT_NULL` (dotted names of fields that may not be
    null).
    """

    path: Path
    id: str
    created: str
    command: list[str]
    arguments: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any]
    protocol: dict[str, Any]

    SCHEMA: ClassVar[str]
    KIND: ClassVar[str]
    REQUIRED: ClassVar[Mapping[str, Any]]
    NOT_NULL: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def check(cls, content: Any, where: str) -> None:
        """Raise ValueError, naming `where` and the field, unless `content` is a complete record of this kind."""
        check_schema(content, cls.SCHEMA, cls.KIND, where)
        check_keys(content, cls.REQUIRED, where)
        for name in cls.NOT_NULL:
            if field_value(content, name) is None:
                raise ValueError(f"{where}: field {name!r} is null; a record must state it")
        cls.check_own(content, where)
        check_environment(content["environment"], cls.device_of(content), where)

    @classmethod
    def check_own(cls, content: Mapping[str, Any], where: str) -> None:
        """What this kind checks beyond keys and status; raises ValueError."""

    @classmethod
    def device_of(cls, content: Mapping[str, Any]) -> str:
        """The device that the environment of a record must describe."""
        return str(content["protocol"]["device"])

    @classmethod
    def build(cls, record: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """Content of a record's file: `schema` and `more` filled in, paths cut, NaN null, checked.

        Raises ValueError: a required field is missing or malformed, or the id is no plain file name.
        """
        content = {"schema": cls.SCHEMA, **scrub_paths(plain_json(record)), **more}
        cls.check(content, f"{cls.KIND} record {record.get('id')!r}")
        return content

    @classmethod
    def place(cls, content: Mapping[str, Any], directory: Path | str) -> Path:
        """The file of a record in a folder. Raises ValueError if a complete record of that id is there."""
        path = Path(directory) / f"{content['id']}.json"
        if path.exists() and getattr(cls.read(path), "status", "complete") == "complete":
            raise ValueError(
                f"{cls.KIND} record {content['id']!r}: {path} exists already; complete records are never overwritten"
            )
        return path

    @classmethod
    def write(cls, record: Mapping[str, Any], directory: Path | str) -> Path:
        """Write a record atomically as ``<id>.json``; returns its path.

        Raises ValueError as `build` and `place`. Raises WriteError: the file could not be written; nothing is left
        behind.
        """
        content = cls.build(record)
        return write_json(cls.place(content, directory), content)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read and check one record.

        Raises ValueError, naming the file and the field: no JSON, another kind or version, or an incomplete record.
        """
        path = Path(path)
        content = read_json(path)
        cls.check(content, str(path))
        return cls(path=path, **cls.values(content))

    @classmethod
    def values(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes of a record, but for its path, from the content of its file."""
        return {one.name: content[one.name] for one in fields(cls) if one.name in content}

    @classmethod
    def below(cls, folder: Path | str) -> list[Self]:
        """All records of this kind below a folder, by creation time and id; other JSON files are left alone.

        Raises ValueError as `read`, and for a file that is no JSON: a record that was cut short is not passed over.
        """
        family = cls.SCHEMA.partition("/")[0]
        paths = [path for path in sorted(Path(folder).rglob("*.json")) if family_of(path) == family]
        return sorted(map(cls.read, paths), key=lambda record: (record.created, record.id))


@dataclass(frozen=True)
class StatusRecord(BaseRecord):
    """A record of work that may end early; `STATUSES` are the accepted values of the field `status`."""

    status: str
    status_reason: str | None

    STATUSES: ClassVar[tuple[str, ...]]

    @classmethod
    def check(cls, content: Any, where: str) -> None:
        super().check(content, where)
        if content["status"] not in cls.STATUSES:
            raise ValueError(f"{where}: field 'status' is {content['status']!r}; accepted: {', '.join(cls.STATUSES)}")
        if (content["status"] == "complete") != (content["status_reason"] is None):
            raise ValueError(
                f"{where}: field 'status_reason' must be null for complete records and say why for all others"
            )
