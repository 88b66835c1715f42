/** The five modalities and their quantities, in the specification's own terms. */
export const sequences = {
  Topology: "토폴로지",
  Tensor: "텐서",
  Functional: "기능",
  Tracts: "경로",
  Anomaly: "이상",
  "Static structure: every head and MLP, and how many parameters it has.":
    "정적 구조: 모든 헤드와 MLP, 그리고 각각의 파라미터 수.",
  "Lighter and larger: more parameters.": "밝고 클수록 파라미터가 많습니다.",
  "How large the weights of each component are, as published; no prompt is read.":
    "각 컴포넌트의 가중치(weight) 크기. 공개된 그대로이며 프롬프트를 읽지 않습니다.",
  "Lighter blue: larger weights. A ring marks weights far outside the rest of their tensor.":
    "밝은 파랑일수록 가중치가 큽니다. 고리는 텐서의 나머지에서 크게 벗어난 이상치(outlier)입니다.",
  "What each component writes to the residual stream at each token of a prompt.":
    "프롬프트의 각 토큰에서 컴포넌트가 잔차 스트림에 쓰는 활성화(activation).",
  "Hotter and larger: writes more at this token.": "뜨겁고 클수록 이 토큰에서 더 많이 씁니다.",
  "Which components carry the answer, and along which paths: what replacing each one does to it.":
    "어떤 컴포넌트가 어떤 경로로 정답을 나르는지: 각각을 대체하면 정답이 어떻게 변하는지 봅니다.",
  "Green: the answer suffers without it. Violet: the answer gains. Tracts join what one writes to what another reads.":
    "초록: 없으면 정답이 약해집니다. 보라: 없으면 강해집니다. 경로는 한쪽이 쓴 것과 다른 쪽이 읽는 것을 잇습니다.",
  "Uncertainty, where the prediction appears, and whether more than habit supports it, against what is ordinary for this model.":
    "불확실성, 예측이 나타나는 깊이, 습관 이상의 근거가 있는지를 이 모델의 평소와 견줍니다.",
  "Grey is ordinary. Red, ringed and pulsing: farther from ordinary than the false-alarm rate allows.":
    "회색은 정상입니다. 빨간색 고리와 펄스는 오경보율이 허용하는 범위를 넘은 이상 지점입니다.",
  Parameters: "파라미터",
  RMS: "RMS",
  "Outlier share": "이상치 비율",
  "Largest weight": "최대 가중치",
  "Copying (OV)": "복사 (OV)",
  Activity: "활성화",
  Effect: "효과",
  Estimate: "추정치",
  Direct: "직접 기여",
  Difference: "차이",
  "Size of change": "변화 크기",
  Perturbed: "자극 후",
  Clean: "원본",
  "Causal trace": "인과 추적",
  Recovery: "회복",
  "KL change": "KL 변화",
  Unusual: "이상 점수",
} as const;
