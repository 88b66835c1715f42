/** What each quantity measures. */
export const cards = {
  Measures: "측정 대상",
  Formula: "수식",
  Hook: "훅",
  "none: no run is needed": "없음: 모델을 실행하지 않습니다",
  Unit: "단위",
  Reading: "읽는 법",
  Here: "이번 스캔",
  Source: "출처",
  "How many numbers of the model belong to the part.": "그 부품에 속한 파라미터 수.",
  "How large the part's weights are, as published.": "공개된 그대로의 가중치 크기.",
  "Which share of the weights lies far outside of the rest of their tensor.":
    "텐서의 나머지에서 크게 벗어난 가중치의 비율.",
  "The part's largest weight.": "그 부품의 가장 큰 가중치.",
  "Whether the head writes what it reads: 1 copies, −1 writes the opposite.":
    "헤드가 읽은 것을 그대로 쓰는지: 1은 복사, −1은 반대로 씀.",
  "How much the part writes to the residual stream at the token.":
    "그 토큰에서 부품이 잔차 스트림에 쓰는 양.",
  "How much more or less the part writes once something was changed.":
    "자극 후 부품이 더 쓰거나 덜 쓰는 양.",
  "How far the part's write moved, whichever way.":
    "부품의 출력이 움직인 거리. 방향은 따지지 않음.",
  "How much the part writes with something changed.": "자극을 준 상태에서 부품이 쓰는 양.",
  "How much the part writes with nothing changed.": "자극 없이 부품이 쓰는 양.",
  "How much of the answer one clean value brings back after the subject was drowned or replaced.":
    "주어를 노이즈로 덮거나 바꾼 뒤, 원본 값 하나가 정답을 얼마나 되살리는지.",
  "What replacing the part does to the answer.": "부품을 대체하면 정답이 어떻게 변하는지.",
  "What replacing the part would do, to first order.": "부품을 대체했을 때의 변화, 1차 추정.",
  "What the part writes straight for the answer, past everything that follows.":
    "뒤의 부품을 거치지 않고 정답에 직접 쓰는 양.",
  "How unusual the part's change of the prediction is for this model.":
    "부품이 예측을 바꾼 정도가 이 모델에서 얼마나 드문지.",
  "Whether the part brings the prediction nearer to the model's own, or farther from it.":
    "부품이 예측을 모델 자신의 답에 가깝게 하는지, 멀게 하는지.",
} as const;
