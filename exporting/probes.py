# ruff: noqa: RUF001 (unusual characters on purpose)
"""Texts on which two tokenizers are compared: scripts, whitespace, contractions, symbols."""

LINES = r"""
The quick brown fox jumps over the lazy dog. Hello, world!
don't I'll we've they're I'd it's I'm DON'T I'LL WE'VE THEY'RE I'D IT'S I'M
's't're've'm'll'd 'S'T'Re'vE rock 'n' roll ''quoted'' ' ſ 'ſ
CamelCase snake_case kebab-case UPPER mixedCASE iPhone McDonald XMLHttpRequest
naïve café résumé Ünïcödé Straße ǅ ﬁ İi ıI Íslenska þæð Türkçe ğış żółć řž Tiếng Việt
ελληνικά Ωμέγα Русский текст Українська мова български ქართული Հայերեն Ꮳꮃꭹ
עברית שלום العربية مرحبا فارسی اردو ﷺ
हिन्दी नमस्ते বাংলা தமிழ் வணக்கம் తెలుగు ಕನ್ನಡ മലയാളം ગુજરાતી ਪੰਜਾਬੀ සිංහල
ไทย สวัสดี ລາວ မြန်မာ ខ្មែរ བོད་སྐད አማርኛ
中文 你好，世界。 繁體中文 日本語のテキスト、カタカナ。 한국어 안녕하세요 ﾊﾝｶｸ ＦＵＬＬ
𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒜 𐍈𐌰 𐤀 𠀀
0 7 42 365 1984 12345 1234567890 12345678901234567890
3.14159 -2.5e-10 1,000,000 0x1F 007 1st 2nd 1a2b3c 24/7 99%
٣٤٥ १२३ Ⅳ ½ ² ① 1½2
a+b=c*(d-e)/f%g !?.,;:"#$%&/()=|{[<>]}\^~`@_ -- --- ... … !!!??? ////
«guillemets» “quotes” ‘single’ don’t €£¥§©®™°±×÷ → ∞ ≠ ∑
😀 😀😃😄 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ❤️ ☃ ♥ word😀word
def f(x):  return x ** 2  # comment
<div class="a">text</div> https://example.com/a?b=c&d=%20 a@b.org
SELECT * FROM t WHERE x = 'y'; $x^2 + \frac{1}{2}$ /usr/local/bin C:\Windows #hashtag @user
<|endoftext|> <|im_start|>user<|im_end|> <s></s> [CLS] <PAD><UNK><BOS><EOS> <think></think> <|
pneumonoultramicroscopicsilicovolcanoconiosis Donaudampfschifffahrtsgesellschaftskapitän
"""
RUNS = ("", " ", "  ", "    ", "\n", "\n\n", " \n", "\n  ", " \n\n ", "\r\n", "\t", "\t\n", "\xa0")
PROBES = [
    "",
    *LINES.strip().split("\n"),
    LINES,
    *(left + run + right for run in RUNS for left in ("", "a", "1", "!") for right in ("", "b")),
    *(
        f"a{space}b {space} c"
        for space in "\r\x0b\x0c\x00\x01\x1c\x1f\x7f\x85\u2003\u2028\u3000\ufeff"
    ),
    "e\u0301 a\u0308\u0323 \u0301 \u200bzero\u200dwidth \u212b \u1100\u1161",  # not in normal form
    "x" * 1000,
    "ab" * 500 + " " * 100 + "9" * 100 + "." * 100 + "\n" * 100 + "é" * 100,
]
