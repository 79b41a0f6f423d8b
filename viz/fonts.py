"""Fonts for the characters of all scripts."""

from corpus.text import note


def drawable(labels: list[str]) -> list[str]:
    """Labels for a figure. Matplotlib's font lacks Chinese, Japanese and others: all later texts
    use installed fonts too, and characters that none of them has become escapes, with a note."""
    import matplotlib  # slow
    from matplotlib import font_manager, ft2font

    names, missing = ["sans-serif"], {char for char in "".join(labels) if char.isprintable()}
    fonts = [f for f in font_manager.fontManager.ttflist if "Last Resort" not in f.name]  # boxes
    for font in sorted(fonts, key=lambda font: font.name != "DejaVu Sans"):  # matplotlib's first
        if missing:
            glyphs = ft2font.FT2Font(font.fname).get_charmap()
            found = {char for char in missing if ord(char) in glyphs}
            names += [font.name] * bool(found)
            missing -= found
    matplotlib.rcParams["font.family"] = names
    if missing:
        note("pictures show \\u... for characters without an installed font (try Noto Sans CJK)")
    return [label.translate({ord(c): ascii(c)[1:-1] for c in missing}) for label in labels]
