r"""Pairs of a right answer and what a model put into its box, with the verdict a careful person gives.

A pair is right if a reader who knows the question would accept it: the same number, set, or expression in another form
is right; a number rounded, a part of the answer, or another unit of another size is not.
"""
from __future__ import annotations

RIGHT: dict[str, list[tuple[str, str]]] = {
    'integers': [
        ('72', '72'), ('72', ' 72 '), ('1234', '1,234'), ('1234567', '1,234,567'), ('72', '72.0'), ('72', '72.'),
        ('-5', '-5'), ('-5', '- 5'), ('5', '+5'), ('72', '072'), ('25', '025'), ('72', '$72$'), ('72', r'\(72\)'),
        ('1000000', '10^6'), ('1000000', r'10^{6}'), ('8', '2^3'), ('12', r'3 \cdot 4'), ('0', '-0'),
        ('12000', r'12{,}000'), ('12000', r'12\,000'), ('12000', '12 000'), ('3', r'\lfloor 3.7 \rfloor')],
    'decimals': [
        ('0.5', '.5'), ('0.5', '0.50'), ('2.5', '2.500'), ('0.1', r'\frac{1}{10}'), ('12.25', '12.25'),
        ('0.001', '10^{-3}'), ('1.5', r'1\frac{1}{2}')],
    'fractions': [
        (r'\frac{1}{2}', '1/2'), (r'\frac{1}{2}', '0.5'), (r'\frac12', r'\frac{1}{2}'),
        (r'\frac{1}{2}', r'\dfrac{1}{2}'),
        (r'\frac{1}{2}', r'\tfrac12'), (r'\frac{1}{2}', r'\frac{2}{4}'), (r'-\frac{3}{4}', r'\frac{-3}{4}'),
        (r'-\frac{3}{4}', r'\frac{3}{-4}'), (r'\frac{7}{3}', r'2\frac{1}{3}'), (r'\frac{14}{3}', '14/3'),
        ('2', r'\frac{4}{2}'), (r'\frac{3}{56}', r'3/56'), (r'\frac{x}{2}', r'\frac{1}{2}x'),
        (r'\frac{1}{3}', '(1/3)'), (r'\frac{5}{2}', '2 1/2'), ('-2.5', '-2 1/2'), (r'\frac{1}{2}', r'\frac 1 2')],
    'percentages and units': [
        ('25', r'25\%'), (r'25\%', '25'), (r'50\%', '50%'), ('18', r'\$18'), ('18', r'\$18.00'), ('70000', r'\$70,000'),
        ('12000', '12 000 meters'),
        ('10', r'10\text{ cm}'), (r'10\text{ cm}', '10'), ('10', r'10 \text{ dollars}'), (r'90^\circ', '90'),
        ('90', r'90^{\circ}'), (r'12\text{ square units}', r'12'), ('5', r'5\ \mathrm{km}'), ('7', '7 apples'),
        ('3', r'3 \text{ hours}'), ('540', '540 meters'), ('12.5', r'12.5\%'), (r'62.5\%', '62.5'),
        ('0.125', r'12.5\%'), ('25', '25 percent')],
    'units in words': [
        ('18', '18 dollars'), ('18', '18 eggs'), ('70000', '70,000 dollars'), ('460', '460 dollars.'),
        ('20', '20 cups'),
        ('64', '64 USD'), ('260', '260 sheep'), ('45', '45 miles per hour'), ('7', '7 km/h'), ('7', '7 people'),
        ('18', '18 years old'), ('5', r'\text{5 dollars}'), (r'382 \text{ dollars}', '382 dollars'),
        (r'15\mbox{ cm}^2', '15 cm^2'), ('24', '24 square feet'), (r'\frac{1}{2}', r'\frac{1}{2} cup'),
        ('3', '3 a day'),
        ('-5', '-5 degrees Celsius'), ('5', 'x = 5 dollars'), ('3000000', '3 million'),
        ('3000000', '3 million dollars')],
    'signs': [
        ('60', '60°'), ('-3', '−3'), (r'2\sqrt{3}', '2√3'), (r'\sqrt{x+1}', '√(x+1)'), (r'(-\infty, 3]', '(-∞, 3]'),
        (r'(-\infty,3)\cup(4,5)', '(-∞,3)∪(4,5)'), (r'\frac{5}{2}', '2½'), ('x^2+1', 'x²+1'), ('5', '€5'),
        ('10', r'10~\text{kg}'), ('7', '7,'), (r'\text{(E)},', '(E)'), (r'\text{A,B,E}', 'A,B,E'), (r'2\pi', '2π')],
    'roots and powers': [
        (r'\sqrt{2}', r'\sqrt2'), (r'2\sqrt{3}', r'\sqrt{12}'), (r'\frac{\sqrt{2}}{2}', r'\frac{1}{\sqrt{2}}'),
        (r'3\sqrt{2}', r'3 \cdot \sqrt{2}'), ('4', r'\sqrt{16}'), (r'\sqrt[3]{8}', '2'), (r'2^{10}', '1024'),
        (r'5\sqrt{5}', r'5^{3/2}'), (r'\frac{3\sqrt{3}}{2}', r'\frac{3}{2}\sqrt{3}'), (r'1+\sqrt{5}', r'\sqrt{5}+1')],
    'constants and functions': [
        (r'\pi', r'\pi'), (r'2\pi', r'2 \pi'), (r'\frac{\pi}{2}', r'\pi/2'), (r'\frac{3\pi}{4}', r'\frac{3}{4}\pi'),
        ('e', 'e'), (r'\ln 2', r'\ln(2)'), (r'\log_2 8', '3'), (r'\sin 30^\circ', r'\frac{1}{2}'), (r'6!', '720'),
        (r'\binom{5}{2}', '10')],
    'expressions': [
        ('x+1', '1+x'), ('x^2-1', '(x-1)(x+1)'), ('2x+3', '3+2x'), ('x(x+1)', 'x^2+x'), (r'\frac{x+2}{7}', r'(x+2)/7'),
        ('3x^2 - 6x', '3x(x-2)'), ('a+b', 'b + a'), ('y=2x+3', 'y = 2x + 3'), ('y=2x+3', '2x+3'), ('x=5', '5'),
        ('5', 'x=5'), ('(x+1)^2', 'x^2+2x+1'), ('xy', 'yx')],
    'complex numbers': [
        ('3+4i', '4i+3'), ('i', 'i'), ('-i', '-1i'), ('1-2i', r'1 - 2 i'), ('2i', r'2\cdot i')],
    'tuples and points': [
        ('(1,2)', '(1, 2)'), (r'\left(3, \frac{\pi}{2}\right)', r'(3,\frac{\pi}{2})'),
        ('(0.5, 2)', r'(\frac{1}{2}, 2)'),
        ('(-1,3,5)', '( -1 , 3 , 5 )'), (r'(3,\pi/2)', r'\left( 3, \frac{\pi}{2} \right)')],
    'sets and lists': [
        (r'\{1,2,3\}', r'\{3,2,1\}'), ('1,2', '1, 2'), ('1,2', '2,1'), (r'\{1\}', r'\{1\}'),
        ('-2,1', r'1 \text{ and } -2'),
        (r'\{-1, 0\}', r'\left\{ 0, -1 \right\}'), (r'1, \frac{1}{2}', r'0.5, 1')],
    'intervals and inequalities': [
        ('(0,1)', '(0, 1)'), ('[0,1)', '[0, 1)'), (r'(-\infty, 3]', r'(-\infty,3]'),
        (r'(0,1) \cup (2,3)', r'(2,3)\cup(0,1)'),
        (r'[-2, \infty)', r'\left[-2, \infty\right)'), ('x < 3', '3 > x'), (r'x \le 3', r'x \leq 3'),
        (r'[2,5]', r'2 \le x \le 5'), (r'(-\infty, 0)', r'x < 0')],
    'matrices and vectors': [
        (r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}', r'\begin{pmatrix}1\\2\end{pmatrix}'),
        (r'\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}', r'\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}'),
        (r'\begin{pmatrix} 1/2 \\ 0 \end{pmatrix}', r'\begin{pmatrix} \frac{1}{2} \\ 0 \end{pmatrix}')],
    'text': [
        (r'\text{Evelyn}', 'Evelyn'), ('even', r'\text{even}'), (r'\text{Tuesday}', r'\text{ Tuesday }'),
        ('B', r'\text{B}'),
        ('B', r'\textbf{(B)}'), (r'\text{(C)}', '(C)'), (r'\text{odd}', r'\mathrm{odd}')],
    'number systems': [
        ('1011_2', '1011_2'), ('2516_8', '2516_8'), (r'204_5', r'204_{5}'), (r'3.2 \times 10^5', '320000')],
}
WRONG: dict[str, list[tuple[str, str]]] = {
    'integers': [
        ('72', '73'), ('72', '-72'), ('72', '7.2'), ('72', '720'), ('72', '7 2 1'), ('12', '1 2'), ('3', '1 2'),
        ('1,234', '1, 234'), ('1234', '1,235'), ('0', '1'), ('10', '10!'), ('100', '1e3'), ('6', '2 + 3')],
    'decimals': [('0.5', '0.05'), ('3.14', '3.15'), ('0.333', r'\frac{1}{3}'), ('2.5', '2,5')],
    'fractions': [
        (r'\frac{1}{2}', r'\frac{2}{1}'), (r'\frac{1}{2}', r'\frac{1}{3}'), (r'\frac{1}{3}', '0.33'),
        (r'\frac{3}{4}', r'-\frac{3}{4}'), (r'\frac{7}{3}', r'\frac{2 1}{3}'),
        ('21/2', '2 1/2'), (r'\frac{3}{2}', '2 1/2')],
    'percentages and units': [
        ('25', r'2.5\%'), (r'50\%', '5'), ('18', r'\$81'), (r'90^\circ', r'180^\circ'), ('7', '8 apples'),
        ('10', r'100 \text{ cm}'), ('12', r'1 2\text{ cm}'), ('25', r'0.25\%'), ('12.5', r'1.25\%')],
    'units in words': [
        ('18', '19 dollars'), ('18', '18 x'), ('6', '6 xy'), ('3', '3 and 4'), ('5', '5 or 6'), ('5', '5 not 6'),
        ('3', '3 million'), ('5', '5 squared'), ('2', '2 theta'), ('5', '5 more than x'), ('6', '6 times 7')],
    'nearly': [
        (r'\frac{1}{2}', '0.5000001'), (r'\frac{1}{3}', '0.333333'), (r'\pi', '3.141593'), (r'\sqrt{2}', '1.414214'),
        (r'1000\pi', '3141.592654'), (r'\frac{1}{2^{98}}', r'\frac{1}{2^{99}}'),
        (r'\frac{1}{20!}', r'\frac{1}{21!}'), ('3:30', '4:40'), ('5', r'\ne 5'), ('5', '> 5'), ('5', r'x \ge 5'),
        ('-37_8', '-37_9')],
    'roots and powers': [
        (r'\sqrt{2}', '2'), (r'\sqrt{2}', '1.41'), (r'2\sqrt{3}', r'3\sqrt{2}'), (r'2^{10}', '20'),
        (r'1+\sqrt{5}', r'1-\sqrt{5}')],
    'constants and functions': [(r'\pi', '3.14'), (r'2\pi', r'\pi'), ('e', '2.72'), (r'\ln 2', r'\ln 3')],
    'expressions': [
        ('x+1', 'x-1'), ('x^2-1', 'x^2+1'), ('2x+3', '2y+3'), ('y=2x+3', 'y=3x+2'), ('x=5', 'x=6'), ('xy', 'x+y')],
    'complex numbers': [('3+4i', '3-4i'), ('i', '-i'), ('2i', '2')],
    'tuples and points': [('(1,2)', '(2,1)'), ('(1,2)', '(1,2,3)'), ('(1,2)', '1'), ('(-1,3,5)', '(1,3,5)')],
    'sets and lists': [(r'\{1,2,3\}', r'\{1,2\}'), ('1,2', '1'), ('1,2', '1,3'), (r'\{1\}', r'\{1,1,2\}')],
    'intervals and inequalities': [
        ('[0,1)', '[0,1]'), ('(0,1)', '[0,1]'), (r'(-\infty, 3]', r'(-\infty, 3)'), ('x < 3', 'x > 3'),
        ('[2,5]', r'2 < x < 5'), (r'(0,1) \cup (2,3)', '(0,1)')],
    'matrices and vectors': [
        (r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}', r'\begin{pmatrix} 2 \\ 1 \end{pmatrix}'),
        (r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}', '1')],
    'text': [
        (r'\text{Evelyn}', 'Carla'), ('even', r'\text{odd}'), (r'\text{Tuesday}', r'\text{Thursday}'), ('B', 'C'),
        ('B', r'\text{B or C}')],
    'number systems': [('2516_8', '2516_9'), (r'3.2 \times 10^5', r'3.2 \times 10^4')],
    'nothing': [
        ('72', ''), ('72', ' '), ('72', r'\text{}'), ('72', '?'), ('72', r'\ldots'), ('72', r'\boxed{}'), ('72', '{}'),
        ('0', ''), ('0', 'none'), ('72', r'\text{I do not know}'), ('', ''), ('', '72'), ('x', r'\frac{}{}')],
    'hostile LaTeX': [
        ('72', r'\frac{72'), ('72', '}{' * 40), ('72', r'\left(' * 60), ('72', r'\begin{pmatrix}' * 30),
        ('72', '^' * 90),
        ('72', r'\sqrt{' * 60), ('72', r'\input{/etc/passwd}'), ('72', r'\def\x{\x}\x'), ('72', '\x00\x01'),
        ('72', '🦆' * 9),
        ('72', "__import__('os').system('true')"), ('72', r'1/0'), ('72', r'\frac{72}{0}'), ('72', r'\infty'),
        ('72', '(' * 200 + '72' + ')' * 199), ('72', r'\int_0^1 x'), ('72', '72' * 60), ('72', '9' * 399),
        ('72', '+'.join(['x_{1}'] * 60))],
    'without end': [
        ('72', r'9^{9^{9^{9^{9}}}}'), ('72', r'\sum_{n=1}^{10^{12}} \frac{1}{n^{2}+\sin(n)}'), ('72', r'(10^{9})!'),
        ('72', r'\prod_{k=1}^{10^{9}} k')],
}
# Texts as a model writes them, not the inside of a box: there is nothing that could be right in them.
BOXLESS = [
    r'\boxed' + '{' * 100_000, r'\boxed' + '{' * 50_000 + '72' + '}' * 50_000, r'\boxed{' * 15_000 + '7', '72',
    r'the answer is 72', r'\boxed{72', r'\boxed', r'\boxed{72} or \boxed{73}', r'\boxed{' + '7' * 100_000 + '}']
# Right, and rejected: 'math-verify' has no degrees, and takes i for a letter beside some products.
KNOWN_REJECTIONS = {(r'\sin 30^\circ', r'\frac{1}{2}'), ('-i', '-1i'), ('2i', r'2\cdot i')}
