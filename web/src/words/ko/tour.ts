/** The guided tour, and what each modality measures. */
export const tour = {
  "One disc, one part": "원 하나가 부품 하나",
  "Every disc is an attention head or an MLP of the model, layer below layer, from the embedding E to the unembedding U. Lighter and larger: more parameters.":
    "원 하나하나가 모델의 어텐션 헤드 또는 MLP입니다. 임베딩 E에서 언임베딩 U까지 레이어 순서로 놓입니다. 밝고 클수록 파라미터가 많습니다.",
  "Hover a disc to read it.": "원을 가리키면 값을 읽습니다.",
  "The model reads": "모델이 읽습니다",
  "It reads “{prompt}”. Hotter and larger: the part writes more at this token.":
    "“{prompt}”을(를) 읽습니다. 뜨겁고 클수록 이 토큰에서 더 많이 씁니다.",
  "Step through the tokens with , and . or play them with Space.":
    ", 와 . 키로 토큰을 옮기거나 스페이스로 재생하세요.",
  "What carries the answer": "무엇이 정답을 나르는가",
  "Each part was replaced by what it does for “{corrupt}”. Green: without it, {answer} loses against {foil}. Tracts join what one part writes to what another reads.":
    "각 부품을 “{corrupt}”에서의 값으로 바꿔 보았습니다. 초록: 없으면 {foil}에 비해 {answer}이(가) 약해집니다. 경로는 한 부품이 쓴 것과 다른 부품이 읽는 것을 잇습니다.",
  "Drag over the picture for contrast.": "그림 위에서 끌면 명암이 바뀝니다.",
  "The head that moves it most": "가장 크게 움직이는 헤드",
  "Of all heads, {head} moves “ {answer}” most: replacing it changes the answer by {effect} {unit}.":
    "모든 헤드 가운데 {head}이(가) “ {answer}”를 가장 크게 움직입니다. 바꾸면 정답이 {effect} {unit}만큼 변합니다.",
  "Press P to silence it, and see what the model says then.":
    "P를 눌러 침묵시키고 모델이 무엇이라 하는지 보세요.",
  "The scan failed. The tour can be taken again once the service is well.":
    "스캔이 실패했습니다. 서비스가 회복되면 투어를 다시 할 수 있습니다.",
  "Scanning. Watch it come in…": "스캔 중입니다. 들어오는 모습을 보세요…",
  Leave: "나가기",
  Done: "마침",
  Back: "이전",
  Next: "다음",
  Tour: "투어",
} as const;
