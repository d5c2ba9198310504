"""The things of the emoji world: what the font shows, what Chinese calls it, how Chinese counts it.

Three files are read, from where Debian installs them or from paths given: the Noto Color Emoji font (pictures),
the Chinese annotations of the Unicode CLDR (names) and emoji-test.txt (groups). Nothing of them is kept in this
package; a saved world holds what it needs of them.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cogview.errors import InputError

SPRITE_PIXELS = 128
"""Side of a stored sprite. The bitmaps of the font are 136 wide and 128 high."""

GROUPS = ("Food & Drink", "Animals & Nature", "Objects", "Travel & Places", "Activities")
"""The groups of emoji-test.txt that hold things one can draw; the others hold people, smileys, symbols and flags."""

_FONT_SIZE = 109  # the one size the bitmap font has
_FONT_LEFT = 4  # columns 4 to 132 of the 136 hold the glyph
_VARIATION_SELECTOR = "\ufe0f"  # emoji-test.txt writes it, the annotations mostly do not


@dataclass(frozen=True, kw_only=True)
class EmojiFiles:
    """Where the font, the annotations and the list of emoji are; the defaults are Debian's places."""

    font: Path = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    annotations: tuple[Path, ...] = (
        Path("/usr/share/unicode/cldr/common/annotations/zh.xml"),
        Path("/usr/share/unicode/cldr/common/annotationsDerived/zh.xml"),
    )
    emoji_test: Path = Path("/usr/share/unicode/emoji/emoji-test.txt")

    def check(self) -> None:
        """Raise InputError, naming the Debian package, for the first file that is missing."""
        needed = [(self.font, "fonts-noto-color-emoji"), (self.emoji_test, "unicode-data")]
        needed[1:1] = [(path, "unicode-cldr-core") for path in self.annotations]
        for path, package in needed:
            if not path.is_file():
                raise InputError(
                    f"{path} is missing; on Debian or Ubuntu: apt install {package} "
                    f"(or give the path of your own copy: cogview scenes --help)"
                )


@dataclass(frozen=True, kw_only=True)
class EmojiObject:
    """One thing a scene can hold.

    ``name`` is what captions mostly call it, ``synonyms`` what they call it now and then; no name of one thing is
    a name of another. ``measures`` are the measure words it is counted with, the usual one first.
    """

    emoji: str
    name: str
    synonyms: tuple[str, ...] = ()
    measures: tuple[str, ...] = ("个",)
    group: str = field(default="", compare=False)
    subgroup: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.emoji or not self.name or not self.measures:
            raise ValueError(f"a thing needs an emoji, a name and a measure word, got {self.emoji!r}, {self.name!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """The name, then the synonyms."""
        return (self.name, *self.synonyms)


def read_things(files: EmojiFiles) -> tuple[EmojiObject, ...]:
    """Every named emoji of the five groups: the common ones first, then the others in the order of emoji-test.txt."""
    files.check()
    tts_names = _read_names(files.annotations)
    things: dict[str, EmojiObject] = {}
    for emoji, group, subgroup in _read_groups(files.emoji_test):
        key = emoji.replace(_VARIATION_SELECTOR, "")
        if group in GROUPS and key in tts_names:
            tts_name = tts_names[key]
            names = (*_NAMES.get(key, tts_name).split(), tts_name)
            name, *synonyms = dict.fromkeys(names)
            measures = (*_MEASURES.get(key, _SUBGROUP_MEASURES.get(subgroup, "个")).split(), "个")
            things[key] = EmojiObject(
                emoji=emoji,
                name=name,
                synonyms=tuple(synonyms),
                measures=tuple(dict.fromkeys(measures)),
                group=group,
                subgroup=subgroup,
            )
    if not things:
        raise InputError(f"{files.emoji_test} and {files.annotations[0]} have no named emoji in common")
    common = [emoji.replace(_VARIATION_SELECTOR, "") for emoji in COMMON.split()]
    order = dict.fromkeys([emoji for emoji in common if emoji in things] + list(things))
    return _without_shared_names([things[emoji] for emoji in order])


def draw_sprites(things: Sequence[EmojiObject], font: Path) -> np.ndarray:
    """The pictures of ``things``: uint8 (N, 128, 128, 4), RGBA with straight alpha."""
    from PIL import Image, ImageDraw, ImageFont, features

    if not features.check("raqm"):  # without it a joined emoji such as the polar bear falls into its parts
        raise InputError("this build of Pillow lacks the Raqm text layout; install Pillow from its wheels")
    face = ImageFont.truetype(str(font), _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    sprites = np.zeros((len(things), SPRITE_PIXELS, SPRITE_PIXELS, 4), dtype=np.uint8)
    for index, thing in enumerate(things):
        canvas = Image.new("RGBA", (_FONT_LEFT + SPRITE_PIXELS + _FONT_LEFT, SPRITE_PIXELS), (0, 0, 0, 0))
        ImageDraw.Draw(canvas).text((0, 0), thing.emoji, font=face, embedded_color=True)
        sprites[index] = np.asarray(canvas)[:, _FONT_LEFT : _FONT_LEFT + SPRITE_PIXELS]
    return sprites


def _read_names(paths: Sequence[Path]) -> dict[str, str]:
    """The names read aloud ("tts") of the CLDR annotations, by emoji without variation selectors."""
    names = {}
    for path in paths:
        for annotation in ElementTree.parse(path).iter("annotation"):
            if annotation.get("type") == "tts" and annotation.text:
                names[annotation.get("cp", "").replace(_VARIATION_SELECTOR, "")] = annotation.text.replace(" ", "")
    return names


def _read_groups(path: Path) -> list[tuple[str, str, str]]:
    """(emoji, group, subgroup) of every fully qualified emoji, in the order of emoji-test.txt."""
    found = []
    group = subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.removeprefix("# subgroup:").strip()
        elif "; fully-qualified" in line:
            emoji = "".join(chr(int(code, 16)) for code in line.split(";")[0].split())
            found.append((emoji, group, subgroup))
    return found


def _without_shared_names(things: Sequence[EmojiObject]) -> tuple[EmojiObject, ...]:
    """Make every name mean one thing: drop a thing whose name an earlier one has, and synonyms that several have."""
    by_name: dict[str, EmojiObject] = {}
    for thing in things:
        by_name.setdefault(thing.name, thing)
    uses = Counter(name for thing in by_name.values() for name in thing.names)
    return tuple(
        replace(thing, synonyms=tuple(name for name in thing.synonyms if uses[name] == 1)) for thing in by_name.values()
    )


COMMON = """
    🍎 🍌 🐕 🐈 🦊 🚗 🌹 🐟 🐦 🌲 🏠 ⭐ 🍇 🍓 🍉 🍊 🍋 🍐 🍑 🍒 🍍 🥕 🌽 🍅 🍆 🥔 🍄 🍞 🍔 🍕
    🍟 🍦 🍩 🍪 🎂 🥚 🍜 🍚 🥟 ☕ 🥛 🍺 🐎 🐄 🐖 🐑 🐇 🐅 🐘 🐒 🦁 🐻 🐼 🐧 🐓 🦆 🦉 🐸 🐢 🐍
    🐬 🦈 🐙 🦀 🐝 🦋 🐞 🐌 🌻 🌷 🌸 🌵 🍁 🌳 🚌 🚲 🚂 ✈️ 🚀 ⛵ 🚁 🚢 🚕 🚒 🚑 🚜 ⚽ 🏀 🎾 🎈
    🎁 🎸 🎹 🥁 🎻 📖 📱 💻 📺 📷 ⌚ 💡 🔑 ✂️ ✏️ ☂️ 🪑 🛏️ 🚪 👓 👕 👖 👗 👠 🎩 👑 💎 ☀️ 🌙 🌈
    🔥 🧦 ☁️ ⛄ 📚 🥝 🐁 🏔️ 🏆 💰 🍏 ✉️ 🐺 🌍 🔔 🎄 🥭 🦌 🔨 🏥 💐 🥥 ⌨️ 🎃 🦒 🏫 🖱️ 🍗 🔋 🦓
    🏰 🔌 🍝 🏐 🎤 🐨 🍰 ⛪ 🎧 🏓 ☎️ 🍫 🐿️ ⛺ 🔍 🍬 🦅 🕯️ 🏸 🚓 🌴 🏮 🥒 🐊 🧣 🚚 ⚾ 🥦 🧤 🐔
    🧥 🏍️ 🧀 👜 🎲 🐠 🌶️ 🛵 🎒 👟 🐳 🍤 🧸 🚄 👢 🐜 🧢 🍣 ⏰ 🕶️ 🪁 🍀 🥐 🕷️ 👔 🌕 💍 🥜 🐥 🎨
    📦 🌊 🥬 📰 🦜 🖌️ 🧅 ❄️ 🥇 📏 🦔 🧄 📌 💧 🎀 🦇 📎 🍳 ⚡ 🔒 🐹 🍭 🪓 🌺 🧧 🚦 🔧 🍯 🦄 🧹
    🌋 🎉 🧺 🥤 🐪 🧻 🏝️ 🍷 🧼 🐐 🎮 🪥 🍵 🏭 🐂 🛁 🍈 🎯 🚽 ⛲ 🦍 🚿 🫐 🌱 🛋️ 🎡 🏈 🐆 🥑 🪞
    🏎️ 🪟 🦏 🥖 🎳 💊 🚤 🥪 💉 🦛 🔬 🥊 🌮 ⚓ 🐉 🔭 🧲 🥞 🛸 🦖 🎣 ⚙️ 🍖 ⚖️ 🪴 🛰️ 🦞 🛡️ 🥩 ⛸️
    🏹 🧳 🦐 🥓 💣 🎱 🗑️ ⏳ 🦢 🍿 🔦 🍱 🦚 🪐 📻 🧶 🎺 🍙 🕊️ 🌪️ 🎷 🧵 🍛 🪗 🐣 🧭 🌾 💿 🥗 💾
    🎏 🐛 🗼 🍲 🖨️ 🎥 🦘 🗽 🧁 🎐 📅 🦝 💼 🍨 🧱 📁 🧨 🧋 🦑 📐 🪨 🖍️ 🍶 🐶 🎆 🪵 🖋️ 🌼 🥢 📜
    🐱 🏯 📮 🎖️ 🥄 💵 🐰 🕌 🔪 🪙 🎫 🐷 💳 🍧 🎠 🪜 🦩 🥧 🧰 🏒 🎢 🪚 🐚 🍮 🪛 🎪 🥋 🪷 🔩 🍼
    🐡 ⛏️ 🚇 🫖 🗡️ 🦎 🎿 🚋 ⛓️ 🍸 🦕 🩺 🧊 🚙 🛷 🩹 🦙 🧪 🥨 🛴 🧬 🤿 🐩 🥯 📡 🛹 🧴 🦥 🧇 🍂
    🪀 🧽 ⛽ 🌯 🧯 🦦 🛒 🛶 🔮 🍠 🐻‍❄️ 🪣 🪒 🪂 🍢 🐈‍⬛ 🎰 🧷 🍡 🚠 👒 🦃 🎓 🥮 🧩 🛟 🪖 🪲 🧂 👛
    🥀 🌡️ 🪆 👞 🦂 🥫 🥾 ☄️ 🦗 🫑 🩰 ♟️ 👘 ⛈️ 🫒 🦟 🩳 🀄 🍾 💄 🕰️ 🐗 📢 🍹 🧮 🛎️ 🦭 🎭 🎬 🧃
    🌰 🏖️ 📼 🪸 🍽️ 🖼️ 📊 🌠 🐾 📋 🏺 📓 ⛳ 🚧 🪶 🌭 🗿
"""
"""Common things that look different from one another, the commonest first: the first N make a sensible world of N."""

_NAMES = {
    # What people say, the usual name first. The name of the annotations follows by itself when it is not listed.
    "🍎": "红苹果 苹果",
    "🍏": "青苹果",
    "🍌": "香蕉",
    "🐕": "狗 小狗",
    "🐶": "狗头 狗脸",
    "🐈": "猫 小猫",
    "🐱": "猫头 猫脸",
    "🐦": "小鸟 鸟",
    "🚗": "汽车 小汽车 轿车",
    "🏠": "房子 小房子",
    "🍊": "橘子 桔子",
    "🍑": "桃子 桃",
    "🍐": "梨 梨子",
    "🍅": "西红柿 番茄",
    "🍆": "茄子",
    "🥔": "土豆 马铃薯",
    "🥕": "胡萝卜 红萝卜",
    "🌽": "玉米",
    "🍔": "汉堡 汉堡包",
    "🍕": "披萨 比萨",
    "🍦": "圆筒冰激凌 甜筒",
    "🍨": "冰淇淋 冰激凌",
    "🍪": "饼干 曲奇",
    "🎂": "生日蛋糕",
    "🍰": "蛋糕 水果蛋糕",
    "🥚": "鸡蛋 蛋",
    "🍜": "面条 拉面",
    "🥟": "饺子 水饺",
    "☕": "咖啡 热饮",
    "🥛": "牛奶 一杯奶",
    "🍵": "热茶 茶",
    "🐎": "马 骏马",
    "🐴": "马头",
    "🐄": "奶牛 母牛",
    "🐖": "猪 小猪",
    "🐑": "绵羊 母羊",
    "🐇": "兔子 小兔子",
    "🐅": "老虎 虎",
    "🐘": "大象 象",
    "🐒": "猴子 小猴子",
    "🐼": "熊猫 大熊猫",
    "🐓": "公鸡",
    "🐔": "母鸡 鸡",
    "🐥": "小鸡",
    "🐤": "小鸡头",
    "🦆": "鸭子 小鸭子",
    "🐸": "青蛙",
    "🐢": "乌龟 龟",
    "🐙": "章鱼 八爪鱼",
    "🦀": "螃蟹 蟹",
    "🦋": "蝴蝶",
    "🌹": "玫瑰 玫瑰花",
    "🌷": "郁金香",
    "🌼": "雏菊 开花",
    "🥀": "枯萎的花",
    "🌳": "大树 树 落叶树",
    "🌲": "松树",
    "🌴": "棕榈树 椰子树",
    "🍂": "落叶",
    "🌾": "稻子 稻穗",
    "🌱": "幼苗 小苗",
    "🪴": "盆栽 盆栽植物",
    "🚌": "公交车 公共汽车",
    "🚲": "自行车 单车",
    "🚂": "蒸汽火车 小火车",
    "🚆": "火车",
    "🚕": "出租车",
    "🚓": "警车",
    "🚙": "越野车 运动型多用途车",
    "🚢": "轮船 船",
    "🎁": "礼物 礼盒",
    "🥁": "鼓 小鼓",
    "🎹": "钢琴键盘 音乐键盘",
    "📖": "打开的书 打开的书本",
    "💻": "笔记本电脑",
    "📺": "电视机 电视",
    "📷": "相机 照相机",
    "☂": "伞 雨伞",
    "☔": "雨中的伞",
    "👕": "T恤 T恤衫",
    "👗": "连衣裙 裙子",
    "🎩": "礼帽 高帽",
    "👑": "皇冠 王冠",
    "☀": "太阳",
    "🌙": "月亮 弯月",
    "🌝": "微笑的月亮",
    "☁": "云 云朵",
    "🔥": "火焰 火",
    "⭐": "星星",
    "🌍": "地球 地球上的欧洲非洲",
    "🏔": "雪山",
    "💧": "水滴",
    "❄": "雪花",
    "⚡": "闪电 高压",
    "🏏": "板球",
    "🐊": "鳄鱼",
    "🐳": "喷水的鲸",
    "🐋": "鲸鱼 鲸",
    "🐀": "耗子",
    "🕊": "鸽子 鸽",
    "🦕": "长颈恐龙 蜥蜴类",
    "🦙": "羊驼 美洲鸵",
    "🐚": "海螺",
    "🧄": "大蒜 蒜",
    "🌶": "辣椒 红辣椒",
    "🥬": "青菜 绿叶蔬菜",
    "🥑": "牛油果 鳄梨",
    "🥖": "法棍 法式长棍面包",
    "🥐": "羊角面包 牛角面包",
    "🧀": "奶酪 芝士",
    "🍗": "鸡腿 家禽的腿",
    "🥩": "肉块 生肉",
    "🍳": "煎蛋 荷包蛋",
    "🥘": "海鲜饭 装有食物的浅底锅",
    "🍲": "火锅 一锅食物",
    "🥣": "一碗粥 碗勺",
    "🥗": "沙拉 绿色沙拉",
    "🥫": "罐头 罐头食品",
    "🍝": "意大利面 意粉",
    "🍠": "烤红薯 红薯",
    "🍬": "糖果 糖",
    "🍮": "布丁 奶黄",
    "🍤": "炸虾 天妇罗",
    "🍾": "香槟 开香槟",
    "🍷": "葡萄酒 红酒",
    "🍻": "两杯啤酒 干杯",
    "🍹": "果汁 热带水果饮料",
    "🥤": "汽水 带吸管杯",
    "🧃": "盒装果汁 饮料盒",
    "🧋": "珍珠奶茶 奶茶",
    "🥄": "勺子 匙",
    "🍽": "餐具",
    "🏺": "陶罐 双耳瓶",
    "🏯": "日本城堡",
    "🏰": "城堡 欧洲城堡",
    "🗽": "自由女神像 自由女神",
    "🧱": "砖 砖头",
    "🪨": "岩石 石头",
    "🎪": "马戏团帐篷 马戏团",
    "🏖": "沙滩伞 沙滩",
    "🏝": "小岛 无人荒岛",
    "🚄": "高铁 高速列车",
    "🚋": "有轨电车",
    "🛵": "小摩托 小型摩托车",
    "⛽": "油泵 加油站",
    "🚦": "红绿灯 纵向的红绿灯",
    "🚧": "路障",
    "🪐": "土星 有环行星",
    "🕰": "座钟",
    "⏳": "沙漏 沙正往下流的沙漏",
    "⌛": "流完的沙漏",
    "🌕": "满月 圆月",
    "🌊": "海浪 浪花",
    "🌪": "龙卷风",
    "🎆": "焰火",
    "🎉": "礼花 拉炮彩带",
    "🏈": "橄榄球 美式橄榄球",
    "🥋": "练武服 道服",
    "⛳": "高尔夫球洞 高尔夫球",
    "⛸": "冰鞋 滑冰",
    "🎣": "钓鱼竿 鱼竿",
    "🎿": "滑雪板 滑雪",
    "🤿": "潜水面罩 潜水镜",
    "🎯": "飞镖 正中靶心的飞镖",
    "🪀": "悠悠球 溜溜球",
    "🎮": "游戏手柄 手柄",
    "🧸": "泰迪熊 玩具熊",
    "♟": "棋子 兵",
    "🖼": "画 带框的画",
    "🎭": "面具 表演艺术",
    "🎨": "调色盘 调色板",
    "🧵": "线 线轴",
    "🧶": "毛线 毛线球",
    "🕶": "墨镜 太阳镜",
    "👢": "靴子 女靴",
    "👒": "草帽 女帽",
    "🪖": "头盔 军用头盔",
    "👞": "皮鞋 男鞋",
    "👟": "跑鞋 运动鞋",
    "🎒": "书包 背包",
    "💄": "口红 唇膏",
    "💎": "宝石 钻石",
    "🎷": "萨克斯 萨克斯管",
    "🎤": "麦克风 话筒",
    "☎": "电话 电话机",
    "🔌": "插头 电源插头",
    "🖱": "鼠标 电脑鼠标",
    "💿": "光盘",
    "🎥": "摄影机 电影摄影机",
    "🔍": "放大镜 左斜的放大镜",
    "🔎": "右斜的放大镜",
    "💡": "灯泡 电灯泡",
    "🏮": "红灯笼 灯笼",
    "📚": "书 书本",
    "📕": "红色的书 合上的书本",
    "💰": "钱袋",
    "💵": "美元 钞票",
    "✉": "信封 信",
    "📦": "包裹 纸箱",
    "🖌": "画笔 毛笔",
    "📏": "直尺 尺子",
    "📈": "上升的图表 趋势向上的图表",
    "📊": "条形图 柱状图",
    "🗑": "垃圾桶",
    "🔒": "锁 合上的锁",
    "🔨": "锤子 榔头",
    "🪓": "斧头 斧子",
    "🏹": "弓箭 弓和箭",
    "🪚": "锯子 木工锯",
    "🔩": "螺栓 螺母与螺栓",
    "📡": "天线 卫星天线",
    "💉": "注射器 针筒",
    "🛋": "沙发 沙发和灯",
    "🚿": "淋浴 淋浴喷头",
    "🧴": "乳液瓶 乳液",
    "🧺": "篮子 筐",
    "🧻": "卷纸 卫生纸",
    "🪣": "水桶 桶",
    "🧼": "肥皂 皂",
    "🧷": "安全别针 别针",
    "🗿": "石像 摩埃",
    "🪆": "套娃",
    "🎏": "鲤鱼旗",
    "🐾": "爪印 脚印",
}

_SUBGROUP_MEASURES = {
    "animal-mammal": "只",
    "animal-bird": "只",
    "animal-amphibian": "只",
    "animal-reptile": "只",
    "animal-marine": "条",
    "animal-bug": "只",
    "plant-flower": "朵",
    "plant-other": "棵",
    "food-marine": "只",
    "drink": "杯",
    "place-geographic": "座",
    "place-building": "座",
    "place-religious": "座",
    "transport-ground": "辆",
    "transport-water": "艘",
    "transport-air": "架",
    "award-medal": "枚",
    "clothing": "件",
    "musical-instrument": "把",
    "phone": "部",
    "computer": "台",
    "light & video": "台",
    "book-paper": "本",
    "mail": "封",
    "writing": "支",
    "lock": "把",
    "tool": "把",
}

_MEASURES = {
    emoji: measures
    for measures, members in {
        "头": "🐄 🐖 🐘 🐂 🐃 🦬 🦣 🦏 🦛 🐗 🐮 🐷",
        "匹": "🐎 🐴 🦄 🦓",
        "只 头": "🦁 🐻 🐑 🐪 🐫",
        "条 只": "🐍 🐉 🐲 🐊 🐛 🪱",
        "只 条": "🐕",
        "只": "🐙 🦭 🐚 🦑 🐬 🍗 🐺",
        "头 条": "🐳 🐋",
        "个": "🐽 🐾 🕸 🦠 🪹 🪺 🏵 💮 🪸 🍄 🫖 🍼 🪴 🦽 🦼 🛼 🛞 🚨 🚥 🚦 🛑 🚧 🚏 ⛽ ⚓ 🛟 💺 🎗 ⚙ 🧲 🧰 🗜"
        " 🔗 🪝 💣 👜 👛 👝 🎒 🛍 🎵 🎶 🥁 🪘 🔖 🏷 📑 📥 📤 📫 📪 📬 📭 📮 📦 🗳 🎞 🎬 🔋 🪫 🔌 🖱 🖲 💿 📀 💽 💾 🧮"
        " ✉ 📜 🏆 🔍 🔎 🔩 🕹 🪧 🛎 🎓",
        "片": "🍁 🍂 🍃 🪶 🍀 ☘ ❄ 🥓",
        "束": "💐",
        "株": "🌾 🌿 🌱",
        "根": "🥕 🌽 🥒 🌶 🌭 🥖 🥢 🪵",
        "根 个": "🍌",
        "串": "🍇 🍢 🍡",
        "颗 个": "🍓 🍒 🫐 🫒 🌰 🥜 🫘 🥚 🍬",
        "棵": "🥦 🥬",
        "块": "🍖 🥩 🧀 🧈 🍫 🍰 🍪 🍕 🧊 🥮 🧱 🪨 ⌚ 🧼 🧽 🍉 🥧",
        "份": "🍟 🍱 🍛 🍝 🥗 🍮 🍧 🍨 🍿 🥘 📰 📃 📄 🗞",
        "碗": "🍚 🍜 🥣",
        "锅": "🍲 🫕",
        "支": "🍦 🍭 🎷 🎺 💄 🎤",
        "罐": "🍯 🥫",
        "瓶": "🍶 🍾 🧂",
        "盒": "🧃 🥡",
        "双": "🥢 🧦 👠 👟 👞 🥾 👢 👡 🥿 🩴 🩰 ⛸ 🎿",
        "副": "👓 🕶 🥽 🧤 🎧 🍴 🥊",
        "把": "🥄 🔪 ☂ 🌂 ☔ ⛱ 🪑 ✂ 🔑 🗝 🪥 🧹 🪒 🔫",
        "座 栋": "🏠 🏡 🏢 🏥 🏫 🏨 🏬",
        "座": "🎡 🎢 ⛲ 🗼 🗽 🗿 🎠 🕰",
        "顶": "⛺ 🎪 👒 🎩 🧢 👑 ⛑ 🪖 🪂",
        "列": "🚂 🚃 🚄 🚅 🚆 🚇 🚈 🚝 🚞",
        "条": "👖 👗 🧣 👔 🩲 🩳 👙 🛣 🛤 ⛓ 🛶",
        "颗": "⭐ 🌟 🪐 💎 🛰 🌠 ☄ 🧿",
        "枚": "🚀 🪙 💍",
        "朵": "☁ 🌸",
        "道": "🌈 ⚡ 🌌",
        "轮": "☀ 🌕",
        "团": "🔥 🧶",
        "滴": "🩸",
        "棵 个": "🎄 🎋",
        "架": "🎹 🪗 🛸 🔭 🪜 ⚖",
        "台": "📺 📻 🔬 📠 📷",
        "支 个": "🕯 🔦 🌡 🧪 💉",
        "盏": "💡 🏮 🪔 🎃",
        "卷": "🧻 🧵",
        "张": "🖼 🛏 🛋 💳 💴 💵 💶 💷 🎫 🎟 🧾 📊 📈 📉",
        "扇": "🚪 🪟",
        "面": "🪞 🛡",
        "本": "📅 📆 📓",
    }.items()
    for emoji in members.split()
}
