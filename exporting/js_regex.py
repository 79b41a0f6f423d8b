"""Translate the split patterns of tokenizers to JavaScript's regular expressions (flag u).

tiktoken's are those of Rust's fancy-regex crate. JavaScript has no possessive quantifiers and, in
older browsers, no (?i:...); its \\s, \\d, \\w and . match other characters. Parts that are not
translated raise a UserError.
"""

import re

from system.settings import UserError

# Rust's classes, as the content of a JavaScript character class: inside [], and negated outside.
CLASSES = {"s": r"\p{White_Space}", "d": r"\p{Nd}"}
CONTROLS = "rntfv"
CATEGORY = re.compile(r"\\([pP])\{([A-Z][a-z]?)\}|\\([pP])([A-Z])")
RANGE = re.compile(r"[a-z]-[a-z]|[A-Z]-[A-Z]|[0-9]-[0-9]")
QUANTIFIER = re.compile(r"(?:[*+?]|\{\d+(?:,\d*)?\})[+?]?")
GROUPS = ("(?:", "(?=", "(?!", "(?<=", "(?<!", "(?i:")
# Simple case folding: ASCII letters have these other variants.
OTHER_CASES = {"s": "\u017f", "k": "\u212a"}


def to_javascript(pattern: str) -> str:
    """The JavaScript pattern that has the same matches as a pattern of tiktoken. Raises UserError
    if it contains what is not translated.

    >>> print(to_javascript(r"(?i:'t)?\\s++|[^\\S\\p{L}]"))
    (?:'[tT])?(?=(?<p1>\\p{White_Space}+))\\k<p1>|[^\\P{White_Space}\\p{L}]
    """
    return Translator(pattern).translate()


class Translator:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str):
        self.pattern, self.at, self.n_possessive = pattern, 0, 0

    def translate(self) -> str:
        translated = self.alternatives(ignore_case=False)
        if self.at < len(self.pattern):
            raise self.error()
        return translated

    def error(self) -> UserError:
        part = self.pattern[self.at : self.at + 20]
        return UserError(
            f"a web page cannot split text as this tokenizer does: {part!r} in its pattern cannot "
            "be translated to JavaScript"
        )

    def match(self, regular: re.Pattern[str]) -> re.Match[str] | None:
        """What is next, if it matches."""
        if found := regular.match(self.pattern, self.at):
            self.at = found.end()
        return found

    def alternatives(self, ignore_case: bool) -> str:
        """All up to the end of the pattern or of the group."""
        parts = []
        while self.at < len(self.pattern) and self.pattern[self.at] != ")":
            if self.pattern[self.at] == "|":
                self.at += 1
                parts.append("|")
            else:
                parts.append(self.repeated(ignore_case))
        return "".join(parts)

    def repeated(self, ignore_case: bool) -> str:
        """An atom and its quantifier. X++, which gives nothing back, becomes (?=(X+))\\1: a
        lookahead, once it has matched, is not tried again."""
        atom = self.atom(ignore_case)
        found = self.match(QUANTIFIER)
        if not found:
            return atom
        quantifier = found[0]
        if len(quantifier) > 1 and quantifier.endswith("+"):
            self.n_possessive += 1
            name = f"p{self.n_possessive}"
            return f"(?=(?<{name}>{atom}{quantifier[:-1]}))\\k<{name}>"
        return atom + quantifier

    def atom(self, ignore_case: bool) -> str:
        char = self.pattern[self.at]
        if char == "(":
            return self.group(ignore_case)
        if char == "[":
            return self.char_class(ignore_case)
        if char == "$":
            self.at += 1
            return "$"
        if char == ".":
            self.at += 1
            return r"[^\n]"
        if char in "^*+?{}]":
            raise self.error()
        members = self.member(ignore_case)
        return members if is_one(members) else f"[{members}]"

    def group(self, ignore_case: bool) -> str:
        found = next((g for g in GROUPS if self.pattern.startswith(g, self.at)), None)
        if not found and self.pattern.startswith("(?", self.at):
            raise self.error()
        self.at += len(found or "(")
        content = self.alternatives(ignore_case or found == "(?i:")
        if self.at == len(self.pattern):
            raise self.error()
        self.at += 1
        return f"{found if found and found != '(?i:' else '(?:'}{content})"

    def char_class(self, ignore_case: bool) -> str:
        """A [...] without nested classes and set operations, which Rust has."""
        negated = self.pattern.startswith("[^", self.at)
        self.at += 1 + negated
        members: list[str] = []
        while self.at < len(self.pattern) and self.pattern[self.at] != "]":
            if self.pattern.startswith(("[", "&&", "--", "~~"), self.at):
                raise self.error()
            if found := self.match(RANGE):
                members.append(found[0])
                if ignore_case and found[0][0].isalpha():
                    low, high = ord(found[0][0].lower()), ord(found[0][2].lower())
                    letters = map(chr, range(low, high + 1))
                    others = (OTHER_CASES.get(letter, "") for letter in letters)
                    members += [found[0].swapcase(), *others]
                continue
            if members and re.match("-[^]]", self.pattern[self.at :]):
                raise self.error()  # another range
            members.append(self.member(ignore_case).replace("-", "\\-"))
        if self.at == len(self.pattern) or not members:
            raise self.error()
        self.at += 1
        return f"[{'^' * negated}{''.join(members)}]"

    def member(self, ignore_case: bool) -> str:
        """A character or a class such as \\s, as it is written in and outside of [...]; several
        characters if a letter has cases."""
        if found := self.match(CATEGORY):
            return f"\\{found[1] or found[3]}{{{found[2] or found[4]}}}"
        char = self.pattern[self.at]
        if char == "\\":
            char = self.pattern[self.at + 1 : self.at + 2]
            if char.lower() in CLASSES and char:
                self.at += 2
                known = CLASSES[char.lower()]
                return known if char.islower() else known.replace("p", "P", 1)
            if char in CONTROLS and char:
                self.at += 2
                return f"\\{char}"
            if not char or char.isalnum():
                raise self.error()
            self.at += 1
        self.at += 1
        if ignore_case and char.isalpha():
            if not char.isascii():
                self.at -= 1
                raise self.error()
            return f"{char}{char.swapcase()}{OTHER_CASES.get(char.lower(), '')}"
        return f"\\{char}" if char in "^$\\.*+?()[]{}|/" else char


def is_one(members: str) -> bool:
    """Whether a class has one member, so that it needs no brackets."""
    return len(members) == 1 or members.startswith("\\")
