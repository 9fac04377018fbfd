"""PTX text -> statements. Knows the layout of what LLVM's NVPTX back end and Triton's inline assembly emit."""

import re
from typing import NamedTuple


class Statement(NamedTuple):
    line: int  # in the PTX text, from 1
    source: tuple[int, int] | None  # .loc: file number, line
    guard: str | None
    negated: bool
    opcode: str
    operands: list  # strings; {a, b} is a tuple of strings


class Param(NamedTuple):
    name: str
    size: int
    align: int
    offset: int


class Entry(NamedTuple):
    name: str
    params: list[Param]
    params_size: int
    statements: list[Statement]
    labels: dict[str, int]  # -> index of a statement
    registers: dict[str, str]  # name -> type
    local: dict[str, tuple[int, int]]  # name -> offset, size
    local_size: int
    targets: dict[str, list[str]]
    threads: tuple[int, ...]


class Module(NamedTuple):
    entries: dict[str, Entry]
    shared: dict[str, int]  # offsets of statically sized shared variables, and of the dynamic one behind them
    shared_static: int
    constants: dict[str, bytes]
    files: dict[int, str]
    lines: list[str]


SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4,
         "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "b128": 16}  # fmt: skip
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s*(?:\.ptr[^%\w]*(?:\.\w+\s+)*(?:\.align\s+\d+\s+)?)?"
    r"\s*([\w$]+)(?:\[(\d+)\])?\s*$"
)
LABEL = re.compile(r"([\w$.%]+):(?!:)")
NAME = r"[\w$%.]+"


class PTXError(Exception):
    pass


def parse(text: str) -> Module:
    lines = text.splitlines()
    files = {int(n): name for n, name in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', text, re.MULTILINE)}
    clean = COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    if ".section" in clean:
        clean = clean[: clean.index(".section")]
    shared, static, constants = {}, 0, {}
    for kind, align, size, name, count, init in re.findall(
        rf"\.(shared|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+({NAME})\s*(?:\[(\d*)\])?\s*(=[^;]*)?;", clean
    ):
        total = SIZES[size] * int(count or 1)
        if kind == "shared":
            if count == "" and re.search(rf"\b{re.escape(name)}\[\]", clean):
                continue
            static = -(-static // int(align or 1)) * int(align or 1)
            shared[name], static = static, static + total
        else:
            constants[name] = _initial(init, SIZES[size], total)
    for name in re.findall(rf"\.extern\s+\.shared[^;]*?({NAME})\[\]\s*;", clean):
        static = -(-static // 16) * 16
        shared[name] = static
    entries = {}
    for found in re.finditer(rf"\.entry\s+({NAME})\s*(?:\((.*?)\))?([^{{;]*)\{{", clean, re.DOTALL):
        entries[found[1]] = _entry(clean, found[1], found[2] or "", found[3], found.end(), files)
    if re.search(r"\.func\s+(?!.*;\s*$)", clean, re.MULTILINE):
        for found in re.finditer(rf"\.func\s+(?:\([^)]*\)\s*)?({NAME})\s*\([^)]*\)[^;{{]*([;{{])", clean):
            if found[2] == "{":
                raise PTXError(f"functions that are called are not supported: .func {found[1]}")
    return Module(entries, shared, static, constants, files, lines)


def _initial(text: str, size: int, total: int) -> bytes:
    data = bytearray(total)
    for place, value in enumerate(re.findall(r"-?\w+", text or "")):
        data[place * size : (place + 1) * size] = (int(value, 0) % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(data)


def _entry(clean, name, params_text, directives, start, files) -> Entry:
    params, offset = [], 0
    for part in params_text.split(","):
        if not part.strip():
            continue
        found = PARAM.search(part)
        if found is None:
            raise PTXError(f"parameter {part.strip()!r}")
        size = SIZES[found[2]]
        align = max(int(found[1] or 1), size)
        size *= int(found[4] or 1)
        offset = -(-offset // align) * align
        params.append(Param(found[3], size, align, offset))
        offset += size
    threads = tuple(int(n) for n in re.findall(r"\d+", (re.search(r"\.reqntid([\s\d,]+)", directives) or ["", ""])[1]))
    statements, labels, registers, local, targets, local_size = [], {}, {}, {}, {}, 0
    scopes: list[dict[str, str]] = [{}]
    at, line, source, scope_number = start, clean.count("\n", 0, start) + 1, None, 0
    seek = re.compile(r"[^\s]")
    while True:
        found = seek.search(clean, at)
        line += clean.count("\n", at, found.start())
        at = found.start()
        letter = clean[at]
        if letter == "{":
            scopes.append({})
            at += 1
            continue
        if letter == "}":
            scopes.pop()
            at += 1
            if not scopes:
                break
            continue
        if letter == ";":
            at += 1
            continue
        if label := LABEL.match(clean, at):
            after = clean[label.end() :].lstrip()
            if after.startswith(".branchtargets"):
                end = clean.index(";", at)
                targets[label[1]] = re.findall(NAME, clean[label.end() : end].replace(".branchtargets", ""))
                line += clean.count("\n", at, end)
                at = end + 1
                continue
            labels[label[1]] = len(statements)
            at = label.end()
            continue
        if clean.startswith((".loc", ".file", ".pragma", ".noreturn"), at):
            end = clean.index("\n", at)
            if loc := re.match(r"\.loc\s+(\d+)\s+(\d+)", clean[at:end]):
                source = (int(loc[1]), int(loc[2]))
            at = end
            continue
        end = clean.index(";", at)
        body = clean[at:end]
        here = line
        line += body.count("\n")
        at = end + 1
        if body.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", body, re.DOTALL).groups()
            for item in names.split(","):
                item = item.strip()
                if many := re.match(rf"({NAME})<(\d+)>", item):
                    for number in range(int(many[2])):
                        registers[f"{many[1]}{number}"] = kind
                elif len(scopes) > 1:  # a name of its own for each scope
                    scope_number += 1
                    scopes[-1][item] = f"{item}@{scope_number}"
                    registers[f"{item}@{scope_number}"] = kind
                else:
                    registers[item] = kind
            continue
        if body.startswith(".local"):
            found = re.match(rf"\.local\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+({NAME})\[(\d+)\]", body)
            align = int(found[1] or 1)
            local_size = -(-local_size // align) * align
            local[found[3]] = (local_size, SIZES[found[2]] * int(found[4]))
            local_size += local[found[3]][1]
            continue
        if body.startswith(".param"):
            continue
        statements.append(_statement(body, here, source, scopes))
    return Entry(
        name, params, offset, statements, labels, registers, local, -(-local_size // 16) * 16, targets, threads
    )


def _statement(body, line, source, scopes) -> Statement:
    found = re.match(r"(?:@(!?)([\w$%.]+)\s+)?([\w.:]+)\s*(.*)$", body.strip(), re.DOTALL)
    if found is None:
        raise PTXError(f"line {line}: {body!r}")
    operands, depth, now = [], 0, ""
    for letter in found[4]:
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        if letter == "," and depth == 0:
            operands.append(now.strip())
            now = ""
        else:
            now += letter
    if now.strip():
        operands.append(now.strip())
    local = {}
    for scope in scopes:
        local.update(scope)

    def rename(text):
        if local:
            text = re.sub(NAME, lambda m: local.get(m[0], m[0]), text)
        if text.startswith("{"):
            return tuple(part.strip() for part in text.strip("{} \t\n").split(","))
        return text

    guard = local.get(found[2], found[2]) if found[2] else None
    return Statement(line, source, guard, found[1] == "!", found[3], [rename(text) for text in operands])
